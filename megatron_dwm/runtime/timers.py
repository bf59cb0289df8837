"""Timers of a run: megatron-core's, with Megatron-LM's names and log lines.

megatron-core's schedules and optimizers start and stop timers if their configuration has any. It has
them only during training steps, because passes of evaluations and outer updates would otherwise be counted too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.timers import Timers

from megatron_dwm.config.profiling import ProfilingConfig
from megatron_dwm.runtime.device import current_device

LEVEL_1_TIMERS = (
    *("forward-backward", "layernorm-grads-all-reduce", "embedding-grads-all-reduce", "all-grads-sync"),
    *("params-all-gather", "optimizer-copy-to-main-grad", "optimizer-unscale-and-check-inf"),
    *("optimizer-clip-main-grad", "optimizer-count-zeros", "optimizer-inner-step"),
    *("optimizer-copy-main-to-model-params", "optimizer"),
    *("dwm-before-step", "dwm-weigh", "dwm-after-step"),
)
"""Timers of level 1: Megatron-LM's in its order, then the weighting's."""
LEVEL_2_TIMERS = (
    *("batch-generator", "forward-compute", "backward-compute", "forward-recv", "forward-send", "backward-recv"),
    *("backward-send", "forward-send-forward-recv", "forward-send-backward-recv", "backward-send-forward-recv"),
    *("backward-send-backward-recv", "forward-backward-send-forward-backward-recv"),
)
"""Timers of level 2."""
_LEVELS = {**dict.fromkeys(LEVEL_1_TIMERS, 1), **dict.fromkeys(LEVEL_2_TIMERS, 2)}


class StepTimers:
    """The timers of ``--timing-log-level``; at level 0 there are none, and all calls do nothing."""

    def __init__(self, flags: ProfilingConfig) -> None:
        self._level, self._has_barrier = flags.timing_log_level, flags.barrier_with_L1_time
        self._timers = Timers(flags.timing_log_level, flags.timing_log_option) if flags.timing_log_level else None
        self.has_curves = flags.log_timers_to_tensorboard
        """Whether the times are written to TensorBoard."""

    def timed(self, name: str) -> AbstractContextManager[None]:
        """Return a context that the timer ``name``, one of this module's, times; collective if level 1 has barriers."""
        if self._timers is None or _LEVELS[name] > self._level:
            return nullcontext()
        return self._timed(self._timers(name, log_level=_LEVELS[name]), _LEVELS[name] == 1 and self._has_barrier)

    @contextmanager
    def _timed(self, timer: Any, has_barrier: bool) -> Iterator[None]:
        timer.start(barrier=has_barrier)
        yield  # what fails ends the run, so nobody reads the timer then
        timer.stop()

    def attached(self, *configs: Any) -> AbstractContextManager[None]:
        """Return a context in which megatron-core's timers are active.

        Args:
            configs: megatron-core's configurations of the model and of the optimizer.
        """
        return nullcontext() if self._timers is None else self._attached(configs)

    @contextmanager
    def _attached(self, configs: tuple[Any, ...]) -> Iterator[None]:
        for config in configs:
            config.timers, config.barrier_with_L1_time = self._timers, self._has_barrier
        try:
            yield
        finally:
            for config in configs:
                config.timers = None

    def largest(self, iterations: int) -> dict[str, float]:
        """Return the largest time of each timer over all ranks, in seconds per iteration; collective.

        Timers that no rank has used are left out. Nothing is reset.

        Args:
            iterations: number of iterations since the timers were reset.
        """
        if self._timers is None:
            return {}
        names = [name for name, level in _LEVELS.items() if level <= self._level]
        seconds = torch.tensor(
            [self._timers(name, log_level=_LEVELS[name]).elapsed(reset=False) for name in names],
            device=current_device(),
        )
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return {name: value / iterations for name, value in zip(names, seconds.tolist(), strict=True) if value > 0}

    def text(self, iterations: int, *, should_reset: bool) -> str | None:
        """Return Megatron-LM's lines, with milliseconds per iteration; collective.

        Args:
            iterations: number of iterations since the timers were reset.
            should_reset: whether the timers are reset.

        Returns:
            the lines, on every rank; None if nothing was timed.
        """
        if self._timers is None:
            return None
        names = [name for name, level in _LEVELS.items() if level <= self._level]
        text: str | None = self._timers.get_all_timers_string(names, normalizer=iterations, reset=should_reset)
        return text
