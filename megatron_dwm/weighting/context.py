"""The parts of a run that a weighting is built from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.run_sizes import RunSizes
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.data.blend import DataPaths
from megatron_dwm.data.loader import BatchLoader
from megatron_dwm.data.sampler import BatchPartition
from megatron_dwm.model.engine import PipelineEngine
from megatron_dwm.model.protocols import Optimizer
from megatron_dwm.runtime.process_groups import ParallelState
from megatron_dwm.weighting.bilevel.gradient_mean import NO_MEAN, GradientAverage
from megatron_dwm.weighting.bilevel.lm_gradients import LMGradients
from megatron_dwm.weighting.inputs import WeighterInputs
from megatron_dwm.weighting.loss_factors import LossFactors
from megatron_dwm.weighting.sample_gather import SampleGather
from megatron_dwm.weighting.scored import ScoringOptions
from megatron_dwm.weighting.stage_schedule import StageSchedule
from megatron_dwm.weighting.weight_metrics import WeightMetrics


@dataclass(frozen=True)
class WeightingContext:
    """The parts of a run that a weighting needs."""

    settings: WeightingConfig
    """The weighting's flags."""
    model: ModelConfig
    """The language model's flags."""
    sizes: RunSizes
    seed: int
    bf16: bool
    """Whether the run computes in bf16."""
    log_interval: int
    save: str | None
    """The run's ``--save`` folder."""
    inputs: WeighterInputs | None
    """The weighter's inputs; None without a weighter."""
    stages: StageSchedule
    paths: DataPaths
    tokenizer: Any
    tokenizer_flags: TokenizerConfig
    """The flags that it was built from."""
    padded_vocab_size: int
    engine: PipelineEngine
    optimizer: Optimizer
    partition: BatchPartition
    parallel_state: ParallelState
    make_target_loader: Callable[[int], BatchLoader]
    """Returns a loader of the target set, after a number of consumed samples."""
    device: torch.device


def lm_gradients(context: WeightingContext, gradient_mean: GradientAverage = NO_MEAN) -> LMGradients:
    """Return the passes over the language model in an outer update.

    Args:
        gradient_mean: averages the target gradient over updates.
    """
    micro = context.sizes.micro_batch_size
    return LMGradients(context.settings, context.engine, context.optimizer, micro, gradient_mean)


def weight_metrics(context: WeightingContext) -> WeightMetrics:
    """Return the object that computes the metrics of each step's weights."""
    gather = SampleGather(context.partition, context.parallel_state)
    is_per_token = context.engine.config.calculate_per_token_loss
    loss_factors = LossFactors(context.sizes.micro_batch_size, is_per_token, context.parallel_state)
    return WeightMetrics(context.stages, gather, loss_factors, context.paths.train_sources)


def scoring_options(context: WeightingContext) -> ScoringOptions:
    """Return how scores become weights, from the flags."""
    return ScoringOptions(
        temperature=context.settings.dwm_temperature,
        min_effective_sample_size=context.settings.dwm_min_effective_sample_size,
        check_interval=context.log_interval,
    )
