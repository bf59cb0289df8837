"""Time and memory of an action, on a CPU and on a GPU, on one process or many."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter, process_time
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_dwm.runtime.device import current_device

Clock = Literal["wall", "processor"]


def seconds(action: Callable[[], Any], clock: Clock = "wall") -> float:
    """Return the time of ``action``: from when all ranks are ready until this rank's device has finished."""
    now = perf_counter if clock == "wall" else process_time
    torch.cuda.synchronize()
    dist.barrier()
    start = now()
    action()
    torch.cuda.synchronize()
    return now() - start


def time_in_turns(actions: dict[str, Callable[[], Any]], repeats: int, clock: Clock = "wall") -> dict[str, list[float]]:
    """Measure the seconds of each action on the slowest rank, one list entry a turn.

    Every other turn runs the actions in reverse order, so that no action always follows the same one.
    """
    found: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(repeats):
        for name in list(actions)[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(seconds(actions[name], clock))
    slowest = torch.tensor(list(found.values()), dtype=torch.float64, device=current_device())
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return dict(zip(found, slowest.tolist(), strict=True))


def paired_ratio(one: list[float], other: list[float]) -> float:
    """Return the median of one / other over the turns."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median: two of the values themselves, whatever their distribution.

    The median of the distribution is below the k-th lowest of n values if fewer than k are below it, which has the
    probability of a binomial variable. With fewer than 6 values the interval would be wider than their range, which is
    returned.
    """
    ordered, left_out, fewer = sorted(values), 0, 0
    for k in range(len(ordered)):
        fewer += math.comb(len(ordered), k)
        if fewer / 2 ** len(ordered) > 0.025:
            break
        left_out = k
    return ordered[left_out], ordered[-1 - left_out]


class Stopwatch:
    """The time of parts of a run, measured around the functions that it calls; a part within a part counts once."""

    def __init__(self, clock: Clock = "wall") -> None:
        self._now = perf_counter if clock == "wall" else process_time
        self._elapsed: dict[str, float] = defaultdict(float)
        self._running = False

    def take(self) -> dict[str, float]:
        """Return the seconds of each part since the last call."""
        taken, self._elapsed = dict(self._elapsed), defaultdict(float)
        return taken

    @contextmanager
    def around(self, target: Any, name: str, part: str) -> Iterator[None]:
        """Count the calls of ``target.name`` as ``part`` while the block is open."""
        function, is_attribute_of_target = getattr(target, name), name in vars(target)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._running:
                return function(*args, **kwargs)
            self._running = True
            torch.cuda.synchronize()
            start = self._now()
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.synchronize()
                self._elapsed[part] += self._now() - start
                self._running = False

        setattr(target, name, timed)
        try:
            yield
        finally:
            if is_attribute_of_target:
                setattr(target, name, function)
            else:
                delattr(target, name)


def peak_and_retained(action: Callable[[], Any]) -> tuple[int, int]:
    """Return the most bytes that ``action`` needs beyond those held before it, and those that it leaves behind.

    On a GPU its allocator counts them. On a CPU torch's profiler does, which sees every allocation of this thread: with
    one process that is exact and the same each time, which resident memory is not. With several processes the threads
    of gloo free messages that the profiler does not see, so the figures are too high. The profiler does not know the
    size of what was allocated before it started, so the action runs once before it is counted.
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
    results: Any = profiler.kineto_results  # None only before the block ends
    events = results.events()
    counted = next(event for event in events if event.name() == "counted")
    sizes = [e.nbytes() for e in events if e.name() == "[memory]" and counted.start_ns() <= e.start_ns()]
    running = list(itertools.accumulate(sizes, initial=0))
    return max(running), running[-1]
