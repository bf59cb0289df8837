"""The whole configuration of a pretraining run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from megatron_dwm.config.plan import PlanConfig
from megatron_dwm.config.profiling import ProfilingConfig
from megatron_dwm.config.run_checks import check_run
from megatron_dwm.config.run_sizes import RunSizes
from megatron_dwm.config.start import StartConfig
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
FLAG_GROUPS: dict[str, type] = PARTS | {"start": StartConfig, "plan": PlanConfig, "no_effect": NoEffectConfig}
"""All flags that are accepted."""


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

    @cached_property
    def sizes(self) -> RunSizes:
        """The sizes that follow from several parts."""
        return RunSizes.from_flags(
            self.world_size, self.model.num_layers, self.parallel, self.training, self.data, self.weighting
        )

    @property
    def train_iters(self) -> int:
        """The number of steps of the run."""
        if self.training.train_samples is None:
            return self.training.length
        iteration, consumed = self.resumed_at  # perhaps in batches of another size
        return iteration + self.sizes.batch_sizes.iterations(self.training.train_samples, consumed)

    def flat(self) -> dict[str, Any]:
        """Return all flags by name, as in Megatron-LM's arguments."""
        return {
            field.name: getattr(getattr(self, part), field.name)
            for part, cls in PARTS.items()
            for field in dataclasses.fields(cls)
        }

    def arguments(self) -> dict[str, Any]:
        """Return all flags, and values that follow from them, by their names in Megatron-LM's checkpoints."""
        derived = {
            "world_size": self.world_size,
            "data_parallel_size": self.sizes.data_parallel_size,
            "global_batch_size": self.sizes.global_batch_size,
            "ffn_hidden_size": self.model.ffn,
            "kv_channels": self.model.head_size,
            "encoder_seq_length": self.model.seq_length,
            "virtual_pipeline_model_parallel_size": self.sizes.virtual_stages,
            "position_embedding_type": self.model.positions,
            "train_iters": self.train_iters,
        }
        return self.flat() | derived


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
    if parts["start"].nproc is not None:
        raise UserError("--nproc is for pretrain_dwm.py and megatron-dwm pretrain; leave it out, and use torchrun")
    if parts["no_effect"].no_query_key_layer_scaling and parts["model"].apply_query_key_layer_scaling:
        raise UserError("--no-query-key-layer-scaling contradicts --apply-query-key-layer-scaling; leave one out")
    return RunConfig(world_size=world_size, **{name: parts[name] for name in PARTS})
