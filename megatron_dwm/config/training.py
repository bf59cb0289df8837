"""Flags of the training run: batches, length, seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dwm.config.flags import flag, require_at_least, require_at_most, require_given
from megatron_dwm.config.optimizer import OptimizerConfig
from megatron_dwm.errors import UserError

MAX_SEED = 4_000_000_000
"""NumPy takes seeds below 2**32, and each pipeline stage adds 100."""


@dataclass(frozen=True)
class TrainingConfig:
    """Batches and length of the run."""

    micro_batch_size: int = flag(None, "Samples in one microbatch of one model replica.")
    global_batch_size: int | None = flag(None, "Samples in one step. Default: micro-batch size x data-parallel size.")
    rampup_batch_size: list[int] | None = flag(
        None,
        "START INCREMENT SAMPLES: start with batches of START samples, and enlarge them by INCREMENT until they reach "
        "--global-batch-size after SAMPLES samples. Only with --train-samples.",
        nargs=3,
    )
    decrease_batch_size_if_needed: bool = flag(
        False, "Reduce a batch that is not a multiple of micro-batch size x data-parallel size."
    )
    train_iters: int | None = flag(None, "Steps to train.")
    train_samples: int | None = flag(None, "Samples to train on, instead of --train-iters.")
    exit_interval: int | None = flag(None, "Stop after the first iteration that is divisible by this; 0 for none.")
    exit_duration_in_mins: int | None = flag(None, "Save and stop after this many minutes; 0 for no limit.")
    exit_signal_handler: bool = flag(False, "Save and stop on SIGTERM, SIGINT, SIGUSR1, SIGUSR2 or SIGHUP.")
    skip_train: bool = flag(False, "Only evaluate.")
    seed: int = flag(1234, "Seed of initialization, data order and dropout.")
    data_parallel_random_init: bool = flag(
        False, "Initialize each data-parallel rank differently.", refused="replicas must start equal; leave it out"
    )
    check_for_nan_in_loss_and_grad: bool = flag(
        True, "Do not stop at a NaN in loss or gradient.", "--no-check-for-nan-in-loss-and-grad"
    )
    rerun_mode: Literal["disabled", "validate_results", "report_stats"] = flag(
        "disabled",
        "What happens if a loss or gradient is not finite: the run ends (disabled), or the iteration is run again, to "
        "see whether the result is the same (validate_results). report_stats is not supported.",
    )
    error_injection_rate: int = flag(
        0, "Test validate_results: on average one of this many results is treated as wrong; 0 for none."
    )
    error_injection_type: Literal["correct_result", "transient_error", "persistent_error"] = flag(
        "transient_error", "How injected errors behave when the iteration is run again."
    )
    empty_unused_memory_level: Literal[0, 1, 2] = flag(
        0,
        "Release unused GPU memory: 1 before the optimizer step, 2 also after it.",
    )
    check_weight_hash_across_dp_replicas_interval: int | None = flag(
        None,
        "Iterations between checks that all replicas have the same parameters, which are copied to the CPU for it.",
    )
    manual_gc: bool = flag(False, "Run Python's garbage collection at a fixed interval instead of automatically.")
    manual_gc_interval: int = flag(0, "Steps between garbage collections; 0 for none.")
    test_mode: bool = flag(
        False, "Check in every pass that the norms of queries and keys are the same on all TP ranks."
    )
    deterministic_mode: bool = flag(False, "Use deterministic kernels only.")
    use_cpu_initialization: bool = flag(False, "Initialize weights on the CPU, the same for every TP size.")
    perform_initialization: bool = flag(True, "Do not initialize weights.", "--no-initialization")

    def __post_init__(self) -> None:
        require_given(self, "micro_batch_size", "every run needs it")
        require_at_least(
            self,
            1,
            "micro_batch_size global_batch_size train_iters train_samples seed "
            "check_weight_hash_across_dp_replicas_interval",
        )
        require_at_least(self, 0, "exit_interval exit_duration_in_mins manual_gc_interval error_injection_rate")
        require_at_most(self, MAX_SEED, "seed")
        if self.manual_gc_interval and not self.manual_gc:
            raise UserError(f"--manual-gc-interval {self.manual_gc_interval} has no effect without --manual-gc; add it")
        if (self.train_iters is None) == (self.train_samples is None):
            raise UserError("give exactly one of --train-iters and --train-samples")

        if self.rerun_mode == "report_stats":
            raise UserError(
                "--rerun-mode report_stats is not supported: megatron-core 0.16 fails at it; give validate_results or "
                "disabled"
            )
        if self.error_injection_rate and self.rerun_mode != "validate_results":
            raise UserError(
                f"--error-injection-rate {self.error_injection_rate} tests --rerun-mode validate_results; give that"
            )
        if self.rampup_batch_size is not None and (self.train_samples is None or self.global_batch_size is None):
            raise UserError("--rampup-batch-size needs --train-samples and --global-batch-size; give both")

    @property
    def length(self) -> int:
        """The length of the run, in iterations or in samples, whichever of the two is given."""
        (length,) = (number for number in (self.train_iters, self.train_samples) if number is not None)
        return length

    def should_check_for_nan(self, optimizer: OptimizerConfig) -> bool:
        """Return whether a NaN in loss or gradient ends the run.

        Under a dynamic loss scale it does not: overflows are expected there, and lower the scale.
        """
        return self.check_for_nan_in_loss_and_grad and not optimizer.has_dynamic_loss_scale
