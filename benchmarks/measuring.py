"""Time and memory of what the benchmarks measure, on a CPU and on a GPU, on one process or many."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from megatron_dwm.runtime.device import current_device


def seconds(action: Callable[[], Any]) -> float:
    """Wall time of ``action``, from when all ranks are ready to when this one's device is."""
    torch.cuda.synchronize()
    dist.barrier()
    start = perf_counter()
    action()
    torch.cuda.synchronize()
    return perf_counter() - start


def take_turns(actions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each action, turn by turn and of the slowest rank; every other turn goes backwards."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(repeats):
        for name in list(actions)[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(seconds(actions[name]))
    slowest = torch.tensor(list(found.values()), dtype=torch.float64, device=current_device())
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return dict(zip(found, slowest.tolist(), strict=True))


def paired_ratio(one: list[float], other: list[float]) -> float:
    """Median of one / other over the turns."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


class Stopwatch:
    """Adds up the time of parts, around the functions that a run calls; a part within a part is not counted twice."""

    def __init__(self) -> None:
        self._elapsed: dict[str, float] = defaultdict(float)
        self._running = False

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call."""
        taken, self._elapsed = dict(self._elapsed), defaultdict(float)
        return taken

    @contextmanager
    def around(self, target: Any, name: str, part: str) -> Iterator[None]:
        """While open, calls of ``target.name`` count as ``part``."""
        function, own = getattr(target, name), name in vars(target)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._running:
                return function(*args, **kwargs)
            self._running = True
            torch.cuda.synchronize()
            start = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.synchronize()
                self._elapsed[part] += perf_counter() - start
                self._running = False

        setattr(target, name, timed)
        try:
            yield
        finally:
            if own:
                setattr(target, name, function)
            else:
                delattr(target, name)


def peak_and_retained(action: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that ``action`` needs at most beyond those held before it, and those that it leaves behind.

    On a GPU by its allocator. On a CPU by torch's profiler, which sees every allocation of this thread: on one process
    exact, and the same each time, which resident memory is not. Where several processes talk through gloo, its threads
    free messages unseen, so that the figures are too high. The profiler does not know the size of what was allocated
    before it began to look, so the action is made once before it counts.
    """
    if torch.cuda.is_available():
        action()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held, torch.cuda.memory_allocated() - held
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        action()
        with torch.autograd.profiler.record_function("counted"):
            action()
    events = profiler.kineto_results.events()  # type: ignore[union-attr]  # set when the block ends
    counted = next(event for event in events if event.name() == "counted")
    sizes = [e.nbytes() for e in events if e.name() == "[memory]" and counted.start_ns() <= e.start_ns()]
    running = list(itertools.accumulate(sizes, initial=0))
    return max(running), running[-1]
