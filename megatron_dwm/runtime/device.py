"""The device of this process, and megatron-core on a machine without a GPU.

megatron-core refers to CUDA in many places (``device="cuda"``, ``torch.cuda.current_device()``, RNG state of the GPU).
On a machine without one, :func:`select_device` redirects all of them to the CPU for the life of the process.
This adaptation is confined to this file.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

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
"""Dense 16-bit operations per second by the vendor's data sheet, by a part of the device's name; the first counts."""


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


class _CudaToCpu(TorchFunctionMode):
    """Rewrites ``device="cuda…"`` arguments to the CPU, and reports CPU tensor types as the CUDA ones.

    megatron-core finds a tensor's dtype by comparing ``tensor.type()`` with ``"torch.cuda.FloatTensor"``.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Every operation comes by here: most of them have no keyword arguments.
        if func is torch.Tensor.cuda:
            return args[0]
        if not kwargs:
            result = func(*args)
        else:
            kwargs = dict(kwargs)
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = torch.device("cpu")
            kwargs.pop("pin_memory", None)  # of memory that is copied to a GPU
            result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


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
    # Each would keep every seed, with a traceback, for devices that are never used.
    for unused in (torch.cuda, torch.xpu, torch.mtia):
        unused.manual_seed_all = _CpuAnswer(None)  # type: ignore[attr-defined]
    # Compiling megatron-core's functions would need a C++ compiler, and several seconds.
    torch.compiler.set_stance("force_eager")
    # On a CPU the "GPU RNG context" is the CPU's stream, which is meant to move.
    logging.getLogger(core_random.__name__).setLevel(logging.ERROR)
    core_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    mode = _CudaToCpu()
    mode.__enter__()  # type: ignore[no-untyped-call]
    _keep_in_backward(mode)


def _keep_in_backward(mode: TorchFunctionMode) -> None:
    """Keep ``mode`` active in backward passes, in which megatron-core recomputes activations.

    torch passes ``Tensor.backward`` itself to the mode, and disables the mode until it returns.
    """
    run_backward = torch.autograd.graph._engine_run_backward

    def run_in_mode(*args: Any, **kwargs: Any) -> Any:
        # Called as a function, and inside another backward pass, it is still on; twice it would rename types twice.
        if torch.overrides._is_torch_function_mode_enabled():
            return run_backward(*args, **kwargs)
        with mode:
            return run_backward(*args, **kwargs)

    for module in (torch.autograd, torch.autograd.graph):
        module._engine_run_backward = run_in_mode  # type: ignore[attr-defined]


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
