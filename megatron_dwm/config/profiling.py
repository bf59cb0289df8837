"""Flags of timers and profiling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dwm.config.flags import flag


@dataclass(frozen=True)
class ProfilingConfig:
    """Timers and profiling."""

    timing_log_level: Literal[0, 1, 2] = flag(
        0,
        "What is timed: 0 iterations alone, 1 also what an iteration does once (forward and backward passes, gradient "
        "reduction, optimizer, weighting), 2 also each microbatch and message. Above 0 every timer waits for the GPU.",
    )
    timing_log_option: Literal["max", "minmax", "all"] = flag(
        "minmax", "Which times are logged: the largest over all ranks, the smallest and the largest, or each rank's."
    )
    barrier_with_L1_time: bool = flag(  # noqa: N815 - named as in Megatron-LM
        True,
        "Let the timers of level 1 start without waiting for all ranks.",
        "--no-barrier-with-level-1-timing",
    )
    log_timers_to_tensorboard: bool = flag(
        False, "Also write the time of an iteration, the throughput and the timers to TensorBoard."
    )
