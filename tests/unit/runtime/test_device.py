"""megatron-core's calls for a GPU on a machine without one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from megatron.core import jit
from megatron.core.fusions import fused_bias_geglu
from torch.overrides import BaseTorchFunctionMode

from megatron_dwm.runtime.device import select_device
from tests.distributed.harness import run_distributed


def calls_for_a_gpu() -> dict[str, bool]:
    select_device(0)
    select_device(0)  # has no further effect
    scripted = torch.jit.script(_zeros_like)
    answers = {
        "a device's name": torch.tensor([1.5], device="cuda").device.type == "cpu",
        "a device's name and number": torch.randn(2, device="cuda:0").device.type == "cpu",
        "a device": torch.zeros(2, device=torch.device("cuda", 0)).device.type == "cpu",
        "a tensor of the same shape": torch.empty_like(torch.ones(2), device="cuda").device.type == "cpu",
        "a tensor of the same type": torch.ones(2).new_zeros(3, device="cuda").device.type == "cpu",
        "another device": torch.ones(2).to(device="cuda").device.type == "cpu",
        "the current device": torch.ones(2, device=torch.cuda.current_device()).device.type == "cpu",
        "pinned memory": torch.empty(2, device="cpu", pin_memory=True).device.type == "cpu",
        "a copy to the GPU": torch.ones(2).cuda(non_blocking=True).tolist() == [1, 1],
        "the name of a type": torch.ones(2).type() == "torch.cuda.FloatTensor",
        "another type": torch.ones(2).type(torch.float64).dtype == torch.float64,
        "a scripted function": scripted(torch.ones(3)).tolist() == [0, 0, 0],
        "other devices": torch.zeros(2, device="meta").is_meta,
        "a default device": _on_meta().is_meta,
    }
    with BaseTorchFunctionMode():
        answers["the name of a type in a mode"] = torch.ones(2).type() == "torch.cuda.FloatTensor"
    with ThreadPoolExecutor(1) as thread:
        answers["another thread"] = thread.submit(torch.zeros, 1, device="cuda").result().device.type == "cpu"
    return answers


def _zeros_like(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(x.shape, dtype=x.dtype)


def _on_meta() -> torch.Tensor:
    with torch.device("meta"):
        return torch.zeros(2)


def test_calls_for_a_gpu_are_answered_by_the_cpu() -> None:
    (answers,) = run_distributed(calls_for_a_gpu, 1)
    assert [call for call, is_right in answers.items() if not is_right] == []


def test_megatron_cores_functions_are_not_compiled_without_a_gpu() -> None:
    assert jit.jit_fuser is jit.noop_decorator
    # What torch.compile returns is a function of torch's.
    assert fused_bias_geglu.geglu.__code__.co_filename == fused_bias_geglu.__file__
