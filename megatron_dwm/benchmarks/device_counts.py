"""Counts of an action's kernel launches, and of results for which the host waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = ("cudaDeviceSynchronize", "cudaEventSynchronize", "cudaStreamSynchronize")


def device_counts(action: Callable[[], Any]) -> dict[str, int]:
    """Return how often ``action`` makes calls that cost the host time, by torch's profiler.

    ``scalar_reads`` (``float(x)``, ``x.item()``, ``bool(x)``) are counted on a CPU too; all else is 0 there. The
    action runs once before it is counted.
    """
    action()
    torch.cuda.synchronize()
    device = "cuda" if torch.cuda.is_available() else None
    with torch.autograd.profiler.profile(use_device=device) as profiler:
        action()
        torch.cuda.synchronize()
    results: Any = profiler.kineto_results  # None only before the block ends
    names = Counter(event.name() for event in results.events())

    def total(*wanted: str) -> int:
        return sum(names[name] for name in wanted)

    return {
        "kernel_launches": total(*LAUNCHES),
        "scalar_reads": total("aten::_local_scalar_dense"),
        "waits": max(total(*WAITS) - 1, 0),  # without the one of this function
    }
