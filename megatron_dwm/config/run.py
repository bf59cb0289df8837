"""The whole configuration of a pretraining run, and the sizes that follow from several of its parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dwm.config.batch_sizes import BatchSizes, Rampup
from megatron_dwm.config.checkpoint import CheckpointConfig
from megatron_dwm.config.checkpoint_args import with_saved_arguments
from megatron_dwm.config.data import DataConfig
from megatron_dwm.config.flags import build, parse
from megatron_dwm.config.logging import LoggingConfig
from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.no_effect import NoEffectConfig
from megatron_dwm.config.optimizer import OptimizerConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.config.plan import PlanConfig
from megatron_dwm.config.profiling import ProfilingConfig
from megatron_dwm.config.run_checks import check_run
from megatron_dwm.config.tasks import TasksConfig
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
    "profiling": ProfilingConfig,
    "tasks": TasksConfig,
    "weighting": WeightingConfig,
}
"""The parts of a run's configuration."""
FLAG_GROUPS: dict[str, type] = PARTS | {"plan": PlanConfig, "no_effect": NoEffectConfig}
"""All flags that are accepted."""
TARGET_PART = 8
"""By default, an outer update reads one target sample for this many samples of the batch."""
TARGET_MOMENTUM = 0.78
"""The running mean then has as little noise as a mean over ``TARGET_PART`` gradients: (1 + 0.78) / (1 - 0.78) = 8."""


@dataclass(frozen=True)
class RunConfig:
    """All flags of a run, checked against each other and the world size."""

    world_size: int
    model: ModelConfig
    parallel: ParallelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    profiling: ProfilingConfig
    tasks: TasksConfig
    weighting: WeightingConfig
    resumed_at: tuple[int, int] = (0, 0)
    """Iterations done and training samples consumed before the run's start or resumption."""

    def __post_init__(self) -> None:
        check_run(self)

    @property
    def data_parallel_size(self) -> int:
        """The number of model replicas."""
        return self.world_size // (self.parallel.tp * self.parallel.pp * self.parallel.cp)

    @property
    def global_batch_size(self) -> int:
        """The number of samples in one step; the largest if steps differ."""
        return self.batch_sizes.running_sizes[-1]

    @property
    def batch_sizes(self) -> BatchSizes:
        """The numbers of samples in the steps of the run."""
        training, micro, dp = self.training, self.training.micro_batch_size, self.data_parallel_size
        ramp = Rampup(*training.rampup_batch_size) if training.rampup_batch_size is not None else None
        final = training.global_batch_size or micro * dp
        return BatchSizes(final, micro, dp, ramp, training.decrease_batch_size_if_needed)

    @property
    def num_microbatches(self) -> int:
        """The number of microbatches of one model replica in one step."""
        return self.global_batch_size // (self.training.micro_batch_size * self.data_parallel_size)

    @property
    def eval_batch_size(self) -> int:
        """The number of samples in one batch of an evaluation."""
        return self.data.eval_global_batch_size or self.global_batch_size

    @property
    def eval_micro_batch(self) -> int:
        """The number of samples per microbatch of an evaluation."""
        return self.data.eval_micro_batch_size or self.training.micro_batch_size

    @property
    def target_batch_size(self) -> int:
        """The number of target samples in one outer update; by default an eighth of the batch, rounded up.

        It is rounded up so that all replicas have the same number of samples, in full microbatches if there are
        several, and in full groups of microbatches with the interleaved schedule. The default for rules that learn no
        weighter is the size of the batch.
        """
        if self.weighting.dwm_target_batch_size is not None:
            return self.weighting.dwm_target_batch_size
        if not self.weighting.has_trainable_weighter:
            return self.global_batch_size
        dp, micro = self.data_parallel_size, self.training.micro_batch_size
        unit, part = dp, -(-self.global_batch_size // TARGET_PART)
        if self.parallel.virtual_stages(self.model.num_layers) is not None:
            unit *= micro * (self.parallel.microbatch_group_size_per_vp_stage or self.parallel.pp)
        elif part > micro * dp or self.parallel.tp_comm_overlap:  # Transformer Engine's buffers fit full microbatches
            unit *= micro
        return min(-(-part // unit) * unit, self.global_batch_size)

    @property
    def target_momentum(self) -> float:
        """The momentum of the target gradient's running mean; 0 if there is none."""
        if not self.weighting.has_trainable_weighter:
            return 0.0
        if self.weighting.dwm_target_momentum is not None:
            return self.weighting.dwm_target_momentum
        return TARGET_MOMENTUM if self.weighting.dwm_target_batch_size is None else 0.0

    @property
    def target_micro_batch(self) -> int:
        """The number of samples per target microbatch, at most the run's and at most a replica's target samples."""
        return max(1, min(self.training.micro_batch_size, self.target_batch_size // self.data_parallel_size))

    @property
    def train_iters(self) -> int:
        """The number of steps of the run."""
        if self.training.train_samples is None:
            return self.training.length
        iteration, consumed = self.resumed_at  # perhaps in batches of another size
        return iteration + self.batch_sizes.iterations(self.training.train_samples, consumed)

    def flat(self) -> dict[str, Any]:
        """Return all flags by name, as in Megatron-LM's arguments."""
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
        description="Pretrain a Megatron-Core GPT with a data weighting model. Flags are Megatron-LM's, plus --dwm-*.",
        reason_unsupported=reason_unsupported,
        main_class=WeightingConfig,
        complete=complete,
    )
    if parts["plan"].plan:
        raise UserError("--plan is for pretrain_dwm.py and megatron-dwm pretrain; leave it out")
    if parts["no_effect"].no_query_key_layer_scaling and parts["model"].apply_query_key_layer_scaling:
        raise UserError("--no-query-key-layer-scaling contradicts --apply-query-key-layer-scaling; leave one out")
    return RunConfig(world_size=world_size, **{name: parts[name] for name in PARTS})
