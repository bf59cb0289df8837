"""Flags of timers and profiling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dwm.config.flags import flag, require_at_least
from megatron_dwm.errors import UserError


@dataclass(frozen=True)
class ProfilingConfig:
    """Timers and profiling."""

    timing_log_level: Literal[0, 1, 2] = flag(
        0,
        "What is timed. 0: iterations only; 1: also the parts of an iteration (forward and backward passes, gradient "
        "reduction, optimizer, weighting); 2: also each microbatch and message. Above 0 every timer waits for the GPU.",
    )
    timing_log_option: Literal["max", "minmax", "all"] = flag(
        "minmax", "Which times are logged: the longest over all ranks, the shortest and the longest, or each rank's."
    )
    barrier_with_L1_time: bool = flag(  # noqa: N815 - named as in Megatron-LM
        True,
        "Let the timers of level 1 start without waiting for all ranks.",
        "--no-barrier-with-level-1-timing",
    )
    log_timers_to_tensorboard: bool = flag(
        False, "Also write the time of an iteration, the throughput and the timers to TensorBoard."
    )
    profile: bool = flag(
        False,
        "Profile some iterations: with nsys (start this program under nsys with --capture-range=cudaProfilerApi), or "
        "with PyTorch's profiler (--use-pytorch-profiler).",
    )
    profile_step_start: int = flag(10, "Iteration after which --profile begins.")
    profile_step_end: int = flag(12, "Last iteration of --profile.")
    profile_ranks: list[int] = flag([0], "Ranks that --profile profiles.")
    use_pytorch_profiler: bool = flag(
        False, "Use PyTorch's profiler for --profile; it writes a trace for TensorBoard to --tensorboard-dir."
    )
    record_memory_history: bool = flag(
        False, "Record the GPU's allocations; the last rank writes them to a file with every log line."
    )
    log_straggler: bool = flag(
        False,
        "Log with every log line which ranks have the fastest and slowest forward passes and batches, and the state of "
        "their GPUs.",
    )
    straggler_minmax_count: int = flag(1, "Ranks that --log-straggler lists as the slowest and as the fastest.")
    straggler_ctrlr_port: int = flag(
        65535, "Port on the first rank's machine; each connection to it turns --log-straggler off or on."
    )
    disable_straggler_on_startup: bool = flag(False, "Start with --log-straggler turned off.")
    log_energy: bool = flag(False, "Log the energy and power of the GPUs; needs NVML (the gpu extra).")
    memory_snapshot_path: str = flag("snapshot.pickle", "File of --record-memory-history.")

    def __post_init__(self) -> None:
        require_at_least(self, 0, "profile_step_start")
        require_at_least(self, 1, "straggler_minmax_count straggler_ctrlr_port")
        if self.straggler_ctrlr_port > 65535:
            raise UserError(f"--straggler-ctrlr-port {self.straggler_ctrlr_port}: a port is at most 65535; lower it")
        if self.profile and self.profile_step_end <= self.profile_step_start:
            raise UserError(
                f"--profile-step-end {self.profile_step_end} is not after --profile-step-start "
                f"{self.profile_step_start}; raise it"
            )
        if self.use_pytorch_profiler and not self.profile:
            raise UserError("--use-pytorch-profiler has no effect without --profile; add it")
