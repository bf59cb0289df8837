"""Simulation of one rank of a run: its model is built and run by the same code as in training, but without data.

Tensors are torch's fake ones, which have a shape, a type and a storage size, but no memory. Process groups are
torch's fake ones, in which every collective call returns at once. Code that depends on values cannot be run this way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.model import torch_layers
from megatron_dwm.model.attributes import temporary_attributes
from megatron_dwm.runtime.device import select_device
from megatron_dwm.runtime.process_groups import ParallelState, build_model_groups, current_parallel_state


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Make all tensors created inside the context fake; they are on the CPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with (
        # torch converts modules by exchanging tensors, which fake tensors do not support.
        temporary_attributes(torch.nn.Module, {"_apply": _apply}),
        torch.compiler.set_stance("force_eager"),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


@contextmanager
def simulated_rank(
    parallel: ParallelConfig, virtual_stages: int | None, world_size: int, rank: int
) -> Iterator[ParallelState]:
    """Simulate ``rank`` of ``world_size`` inside the context; new tensors are fake.

    Needs a process without process groups and GPUs.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore

    select_device(0)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        build_model_groups(parallel, virtual_stages)
        with ExitStack() as stack:
            # All ranks would gather the same objects.
            stack.enter_context(temporary_attributes(dist, {"all_gather_object": _gather_copies}))
            # Random streams are compared, and there is nothing random here.
            stack.enter_context(temporary_attributes(CudaRNGStatesTracker, {"fork": _without_random_stream}))
            # torch's mask object cannot be fake, and changes no size.
            stack.enter_context(temporary_attributes(torch_layers, {"causal_lower_right": _no_mask}))
            stack.enter_context(fake_tensors())
            stack.enter_context(_SingleCalls())  # type: ignore[no-untyped-call]
            yield current_parallel_state()
    finally:
        mpu.destroy_model_parallel()
        dist.destroy_process_group()


class _SingleCalls(TorchDispatchMode):
    """Splits coalesced collective calls into single ones, because torch does not support them for fake tensors."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if not name.startswith("c10d::") or "_coalesced" not in name:
            return function(*args, **(kwargs or {}))
        work = None
        if "allreduce" in name:
            tensors, *rest = args
            for tensor in tensors:
                _, work = torch.ops.c10d.allreduce_([tensor], rest[0], rest[1], None)
            return work
        single = torch.ops.c10d._allgather_base_ if "allgather" in name else torch.ops.c10d._reduce_scatter_base_
        outputs, inputs, *rest = args
        for output, whole in zip(outputs, inputs, strict=True):
            _, work = single(output, whole, *rest)
        return work


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Keep only what a GPU's kernels keep for the backward pass, if that is less than on a CPU."""
    attention = torch.nn.functional.scaled_dot_product_attention

    def attend(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> torch.Tensor:
        return attention(*args, **kwargs)  # a CPU's fused kernel has no dropout; a GPU's keeps nothing for it

    kernels = {"rms_norm": _rms_norm, "scaled_dot_product_attention": attend}
    with temporary_attributes(torch.nn.functional, kernels):
        yield


class _RMSNorm(torch.autograd.Function):
    """The shapes of a fused RMS norm: the input and one number for each token are kept."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        scale = torch.empty(values.shape[:-1], dtype=torch.float32, device=values.device)
        ctx.save_for_backward(values, weight, scale)
        return torch.empty_like(values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        values, weight, _ = ctx.saved_tensors
        return torch.empty_like(values), None if weight is None else torch.empty_like(weight)


def _rms_norm(
    values: torch.Tensor, shape: Any, weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    result: torch.Tensor = _RMSNorm.apply(values, weight)  # type: ignore[no-untyped-call]
    return result


def _no_mask(queries: int, keys: int) -> None:
    return None


def _gather_copies(objects: list[Any], value: Any, group: Any = None) -> None:
    objects[:] = [value] * len(objects)


def _without_random_stream(tracker: Any, name: Any = None) -> AbstractContextManager[None]:
    return nullcontext()


def _apply(module: Any, convert: Any, recurse: bool = True) -> Any:
    """Do as ``torch.nn.Module._apply``, but put new parameters in the place of those that are converted."""
    for child in module.children() if recurse else ():
        _apply(child, convert)
    for name, param in [*module.named_parameters(recurse=False)]:
        converted = convert(param.detach())
        if (converted.dtype, converted.device) != (param.dtype, param.device):
            replaced = torch.nn.Parameter(converted, param.requires_grad)
            replaced.__dict__.update(param.__dict__)
            module.register_parameter(name, replaced)
    for name, buffer in [*module.named_buffers(recurse=False)]:
        setattr(module, name, convert(buffer))
    return module
