"""The whole configuration of a pretraining run, and the checks that concern several of its parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dwm.config.checkpoint import CheckpointConfig
from megatron_dwm.config.checkpoint_args import with_saved_arguments
from megatron_dwm.config.data import DataConfig
from megatron_dwm.config.flags import build, parse
from megatron_dwm.config.logging import LoggingConfig
from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.no_effect import NoEffectConfig
from megatron_dwm.config.optimizer import OptimizerConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.config.training import TrainingConfig
from megatron_dwm.config.unsupported_flags import reason_unsupported
from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.errors import UserError

PARTS: dict[str, type] = {
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "training": TrainingConfig,
    "optimizer": OptimizerConfig,
    "tokenizer": TokenizerConfig,
    "data": DataConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
    "weighting": WeightingConfig,
}
"""What a run's configuration is made of."""
FLAG_GROUPS: dict[str, type] = PARTS | {"no_effect": NoEffectConfig}
"""All flags that are accepted."""


@dataclass(frozen=True)
class RunConfig:
    """Everything the flags say, checked against the world size."""

    world_size: int
    model: ModelConfig
    parallel: ParallelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    weighting: WeightingConfig
    resumed_at: tuple[int, int] = (0, 0)
    """Iterations done and training samples consumed before the run's start or resumption."""

    def __post_init__(self) -> None:
        self._check_world()
        self._check_shards()
        self._check_batches()
        self._check_schedule()
        self._check_outer_update()

    def _check_world(self) -> None:
        tp, pp = self.parallel.tp, self.parallel.pp
        if self.world_size % (tp * pp):
            raise UserError(
                f"world size {self.world_size} is not divisible by --tensor-model-parallel-size {tp} x "
                f"--pipeline-model-parallel-size {pp}; start a multiple of {tp * pp} processes"
            )

    def _check_shards(self) -> None:
        if self.parallel.use_distributed_optimizer and self.optimizer.optimizer != "adam":
            raise UserError(
                f"--use-distributed-optimizer does not go with --optimizer {self.optimizer.optimizer}: megatron-core "
                "shards the state of Adam alone; leave one out"
            )
        tp = self.parallel.tp
        divided = {
            "--num-attention-heads": self.model.heads,
            "--ffn-hidden-size": self.model.ffn,
        }
        if self.model.padded_vocab_size is not None:
            divided["--padded-vocab-size"] = self.model.padded_vocab_size
        if self.parallel.sequence_parallel:
            divided["--seq-length (with --sequence-parallel)"] = self.model.sequence
        for name, value in divided.items():
            if value % tp:
                raise UserError(f"{name} {value} is not divisible by --tensor-model-parallel-size {tp}; change one")
        groups = self.model.query_groups
        if groups % tp and tp % groups:
            raise UserError(
                f"--num-query-groups {groups} is neither a multiple nor a divisor of "
                f"--tensor-model-parallel-size {tp}; change one"
            )

    def _check_batches(self) -> None:
        chunks = self.parallel.virtual_stages(self.model.layers)
        micro, dp = self.training.micro_batch, self.data_parallel_size
        if self.global_batch_size % (micro * dp):
            raise UserError(
                f"--global-batch-size {self.global_batch_size} is not divisible by --micro-batch-size {micro} x "
                f"data-parallel size {dp}; change one"
            )
        if chunks is not None and self.num_microbatches % self.parallel.pp:
            raise UserError(
                f"{self.num_microbatches} microbatches a step are not divisible by --pipeline-model-parallel-size "
                f"{self.parallel.pp}, which virtual stages need; change --global-batch-size or --micro-batch-size"
            )
        samples = self.training.train_samples
        if samples is not None and samples < self.global_batch_size:
            raise UserError(f"--train-samples {samples} is less than one batch of {self.global_batch_size}; raise it")

    def _check_schedule(self) -> None:
        """Require a learning-rate schedule that is counted as the run is, and whose phases fit into each other."""
        optimizer, training = self.optimizer, self.training
        unit, other = ("iters", "samples") if training.train_samples is None else ("samples", "iters")
        for name in ("lr-decay", "lr-warmup", "lr-wsd-decay"):
            if value := getattr(optimizer, f"{name.replace('-', '_')}_{other}"):
                raise UserError(f"--{name}-{other} {value} has no effect with --train-{unit}; use --{name}-{unit}")
        if optimizer.lr_decay_style == "WSD" and getattr(optimizer, f"lr_wsd_decay_{unit}") is None:
            raise UserError(f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}; give it")
        if getattr(optimizer, f"lr_warmup_{unit}") and optimizer.lr_warmup_fraction is not None:
            raise UserError(f"--lr-warmup-fraction and --lr-warmup-{unit} exclude each other; give one")
        bounds = optimizer.lr_bounds(training.train_iters, training.train_samples, global_batch_size=1)
        if bounds.warmup >= bounds.decay:
            raise UserError(
                f"the learning rate's warm-up of {bounds.warmup:g} {unit} does not end before its decay at "
                f"{bounds.decay}; lower --lr-warmup-{unit} (or --lr-warmup-fraction) or raise --train-{unit} "
                f"(or --lr-decay-{unit})"
            )

    def _check_outer_update(self) -> None:
        if not self.weighting.needs_target:
            return
        if self.model.fp8 is not None and self.model.fp8_recipe == "delayed":
            raise UserError(
                f"--fp8-format {self.model.fp8} with --fp8-recipe delayed: an outer update's passes would change the "
                "scales of later steps; use --fp8-recipe tensorwise, or --dwm-mode frozen or off"
            )
        micro, dp = self.training.micro_batch, self.data_parallel_size
        if self.target_batch_size % (micro * dp):
            raise UserError(
                f"--dwm-target-batch-size {self.target_batch_size} is not divisible by --micro-batch-size {micro} x "
                f"data-parallel size {dp}; change one"
            )
        pp = self.parallel.pp
        if self.parallel.virtual_stages(self.model.layers) and self.target_batch_size // (micro * dp) % pp:
            raise UserError(
                f"--dwm-target-batch-size {self.target_batch_size} gives microbatches that are not divisible by "
                f"--pipeline-model-parallel-size {pp}, which virtual stages need; change it"
            )
        half = "--bf16" if self.optimizer.bf16 else "--fp16" if self.optimizer.fp16 else None
        if half and self.weighting.dwm_alignment == "finite-difference":
            raise UserError(
                f"--dwm-alignment finite-difference with {half}: so small a step is lost in the parameters' rounding; "
                "use --dwm-alignment exact"
            )
        if half and self.weighting.dwm_check:
            raise UserError(
                f"--dwm-check with {half}: the differences that it takes are lost in the parameters' rounding; check "
                f"once without {half}, then train without --dwm-check"
            )
        if self.optimizer.optimizer == "sgd" and self.weighting.dwm_preconditioner == "adam":
            raise UserError("--dwm-preconditioner adam needs --optimizer adam, not sgd; use --dwm-preconditioner none")
        if not self.weighting.dwm_target_data_path and not self.data.mock_data:
            mode = "--dwm-mode bilevel" if self.weighting.dwm_rule is None else f"--dwm-rule {self.weighting.dwm_rule}"
            raise UserError(f"{mode} needs --dwm-target-data-path; give the target set, or use --dwm-mode off")

    @property
    def data_parallel_size(self) -> int:
        """The number of model replicas."""
        return self.world_size // (self.parallel.tp * self.parallel.pp)

    @property
    def global_batch_size(self) -> int:
        """The number of samples in one step."""
        return self.training.global_batch_size or self.training.micro_batch * self.data_parallel_size

    @property
    def num_microbatches(self) -> int:
        """The number of microbatches of one model replica in one step."""
        return self.global_batch_size // (self.training.micro_batch * self.data_parallel_size)

    @property
    def target_batch_size(self) -> int:
        """The number of target samples in one outer update."""
        return self.weighting.dwm_target_batch_size or self.global_batch_size

    @property
    def train_iters(self) -> int:
        """The number of steps of the run."""
        if self.training.train_iters is not None:
            return self.training.train_iters
        assert self.training.train_samples is not None
        iteration, consumed = self.resumed_at  # perhaps in batches of another size
        return iteration + max(0, self.training.train_samples - consumed) // self.global_batch_size

    def flat(self) -> dict[str, Any]:
        """Return all flags by their names, as Megatron-LM keeps its arguments."""
        return {
            field.name: getattr(getattr(self, part), field.name)
            for part, cls in PARTS.items()
            for field in dataclasses.fields(cls)
        }


def parse_run(
    argv: Sequence[str] | None,
    world_size: int,
    *,
    read_saved: Callable[[CheckpointConfig], Mapping[str, Any]] | None = None,
) -> RunConfig:
    """Return the configuration that ``argv`` describes for ``world_size`` processes.

    Args:
        argv: the arguments, without the program's name; ``None`` takes ``sys.argv``.
        world_size: the number of processes of the run.
        read_saved: reads the arguments of the checkpoint to load; without it ``--use-checkpoint-args`` is refused.

    Raises:
        UserError: an unknown flag, a bad value, or values that contradict each other.
    """

    def complete(given: dict[str, Any]) -> dict[str, Any]:
        if not given.get("use_checkpoint_args"):
            return given
        if read_saved is None:
            raise UserError("--use-checkpoint-args is not supported: nothing is loaded here; repeat the model's flags")
        return with_saved_arguments(given, read_saved(build(CheckpointConfig, given)))

    parts = parse(
        argv,
        FLAG_GROUPS,
        prog="pretrain_dwm.py",
        description="Pretrain a Megatron-Core GPT with a data weighting model. Flags are Megatron-LM's, plus --dwm-*.",
        reason_unsupported=reason_unsupported,
        main_class=WeightingConfig,
        complete=complete,
    )
    no_effect: NoEffectConfig = parts.pop("no_effect")
    run = RunConfig(world_size=world_size, **parts)
    is_interleaved = run.parallel.virtual_stages(run.model.layers) is not None
    no_effect.check_microbatch_group(run.parallel.pp if is_interleaved else None)
    return run
