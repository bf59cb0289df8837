"""The device of this process, and megatron-core on a machine without a GPU.

megatron-core refers to CUDA in many places (``device="cuda"``, ``torch.cuda.current_device()``, RNG state of the GPU).
On a machine without one, :func:`select_device` redirects all of them to the CPU for the life of the process.
This adaptation is confined to this file.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.jit._builtins
import torch.utils._device

from megatron_dwm.errors import UserError

PEAK_FLOPS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""Dense 16-bit FLOP/s in NVIDIA's data sheets, by a part of the device's name; the first match counts."""


def select_device(local_rank: int) -> torch.device:
    """Make this process's device current and return it.

    With CUDA this is GPU ``local_rank``; otherwise the CPU, to which megatron-core is adapted.

    Raises:
        UserError: more processes on this node than GPUs.
    """
    if not torch.cuda.is_available():
        _adapt_megatron_to_cpu()
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"LOCAL_RANK {local_rank}: this process sees {count} GPU(s); start at most that many processes a node, and "
            "let each see all of the node's (under SLURM --gpus-per-node, not --gpus-per-task)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def current_device() -> torch.device:
    """Return the device that :func:`select_device` made current."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def peak_flops(device: str) -> float | None:
    """Return the peak dense 16-bit operations per second of a device of this name; None if unknown."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)


def leave_functions_uncompiled(core_jit: ModuleType) -> None:
    """Let megatron-core compile no function on a machine without a GPU.

    Its modules wrap functions by ``torch.compile`` when they are imported, and the first wrapper imports torch's
    compiler, which takes a second.

    Args:
        core_jit: ``megatron.core.jit``, before another module has been imported that reads ``jit_fuser`` from it.
    """
    if not torch.cuda.is_available():
        core_jit.disable_jit_fuser()


def _adapt_megatron_to_cpu() -> None:
    """Redirect megatron-core's CUDA calls to the CPU; a second call has no effect."""
    if isinstance(torch.cuda.current_device, _CpuAnswer):
        return
    import megatron.core.tensor_parallel.random as core_random

    cpu = torch.device("cpu")
    torch.cuda.current_device = _CpuAnswer(cpu)
    torch.cuda.synchronize = _CpuAnswer(None)
    torch.cuda.empty_cache = _CpuAnswer(None)
    torch.cuda.current_stream = _CpuAnswer(_CpuStream())
    torch.cuda.default_stream = _CpuAnswer(_CpuStream())
    torch.cuda.Stream = _CpuStream  # type: ignore[assignment, misc]
    modules: tuple[Any, ...] = (torch.cuda, torch.cuda.random)
    for module in modules:
        module.get_rng_state = lambda *_, **__: torch.get_rng_state()
        module.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
        module.manual_seed = torch.manual_seed
    # Without such a device, each would queue every seed it is called with, and a traceback, and never free them.
    for unused in (torch.cuda, torch.xpu, torch.mtia):
        unused.manual_seed_all = _CpuAnswer(None)  # type: ignore[attr-defined]
    # Compiling a library's functions would need a C++ compiler, and several seconds.
    torch.compiler.set_stance("force_eager")
    # It warns that the CPU's random state changes inside a context of the GPU's; here the two are the same.
    logging.getLogger(core_random.__name__).setLevel(logging.ERROR)
    core_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.Tensor.type = _named_as_on_a_gpu(torch.Tensor.type)  # type: ignore[method-assign]
    constructors = [constructor.__name__ for constructor in torch.utils._device._device_constructors()]
    constructors += [name for name in dir(torch) if name.endswith("_like")]
    methods = ["to", *(name for name in dir(torch.Tensor) if name.startswith("new_"))]
    for owner, names in ((torch, constructors), (torch.Tensor, methods)):
        for name in names:
            if hasattr(owner, name):  # some constructors are of other modules
                setattr(owner, name, _on_the_cpu(getattr(owner, name)))


def _on_the_cpu(constructor: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return ``constructor``, one of torch's that take a device, with the CPU for a keyword ``device="cuda…"``."""

    @functools.wraps(constructor)
    def construct(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            kwargs.pop("pin_memory", None)  # of memory that is copied to a GPU
        return constructor(*args, **kwargs)

    # Scripted functions call torch's constructors by their operators.
    operator = torch.jit._builtins._find_builtin(constructor)
    if operator is not None:
        torch.jit._builtins._register_builtin(construct, operator)
    return construct


def _named_as_on_a_gpu(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``method``, ``Tensor.type``, with the names of types as on a GPU.

    megatron-core finds a tensor's dtype by comparing ``tensor.type()`` with ``"torch.cuda.FloatTensor"``.
    """

    @functools.wraps(method)
    def type_of(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        # The last part only: inside a TorchFunctionMode this runs twice, because torch looks methods up by name.
        return f"torch.cuda.{result.split('.')[-1]}" if isinstance(result, str) else result

    return type_of


class _CpuStream:
    """A replacement for ``torch.cuda.Stream`` on a CPU, where every operation is synchronous."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Do nothing: there is nothing to wait for."""


class _CpuAnswer:
    """A replacement for a ``torch.cuda`` function that ignores its arguments; also marks the adaptation as made."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self.answer
