"""The memory of a run's stages, computed from one microbatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dwm.config.run import RunConfig
from megatron_dwm.plan.stage import Pass, Stage
from megatron_dwm.plan.weighter import WeighterPlan


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a pipeline stage."""

    stage: int
    layers: int
    parameters: int
    """Their number."""
    weights: int
    gradients: int
    optimizer: int
    activations: float
    """Peak of the activations in a training step."""
    weighting_between_updates: int
    """The weighter, the replay, and the running mean of the target gradient."""
    weighting_in_update: float
    """What an outer update adds to the peak of plain training, without what is held between updates."""

    @property
    def plain(self) -> float:
        """The peak of plain training."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def peak(self) -> float:
        """The peak of the run."""
        return self.plain + self.weighting_between_updates + self.weighting_in_update


def stage_memory(config: RunConfig, stage: Stage, weighter: WeighterPlan | None) -> StageMemory:
    """Return the memory of a stage, with the schedule's microbatches in flight."""
    microbatches = config.sizes.num_microbatches
    training = held_activations(stage.training, in_flight(config, stage.number, microbatches)) + stage.workspace
    added = 0.0
    held = weighter.held if weighter is not None else 0
    if config.weighting.target_momentum > 0:
        held += stage.gradient_mean
    if config.weighting.needs_alignments:
        added = _update_peak(config, stage, training, weighter) - training
    return StageMemory(
        stage=stage.number,
        layers=stage.layers,
        parameters=stage.parameters,
        weights=stage.weights,
        gradients=stage.gradients,
        optimizer=stage.optimizer,
        activations=training,
        weighting_between_updates=held,
        weighting_in_update=max(0.0, added),
    )


def _update_peak(config: RunConfig, stage: Stage, training: float, weighter: WeighterPlan | None) -> float:
    """Return the peak bytes of an iteration with an outer update, without weights, gradients and optimizer."""
    kind = config.weighting.dwm_alignment
    copy = 0 if config.weighting.dwm_rule == "top-alignment" else stage.parameter_copy  # which does not go back
    direction, learning = stage.direction, 0 if weighter is None else weighter.learning
    samples = config.training.micro_batch_size if kind == "single-sample" else 1
    counts = in_flight(config, stage.number, config.sizes.num_microbatches * samples)
    if kind == "finite-difference":  # without a backward pass, but with a second copy of the parameters
        alignment = max(part.peak for part in stage.alignment) + copy + stage.workspace
    else:
        alignment = held_activations(stage.alignment, counts) + stage.workspace
    preconditioner = stage.preconditioner if config.weighting.dwm_preconditioner == "adam" else 0
    # Taken before the training step, the copy is there in all passes; v is there once the target pass has been made.
    return max(copy + training, copy + direction + preconditioner, copy + direction + alignment, learning)


def held_activations(passes: Sequence[Pass], counts: Sequence[int]) -> float:
    """Return the peak bytes of activations, from each chunk's pass and number of microbatches in flight."""
    kept = sum(part.kept * count for part, count in zip(passes, counts, strict=True))
    return kept + max(part.peak - part.kept for part in passes)


def in_flight(config: RunConfig, stage: int, microbatches: int) -> list[int]:
    """Return the maximum number of microbatches of each model chunk that wait for their backward pass.

    megatron-core's schedules run so many forward passes before the first backward pass, and then one for one.
    """
    pp, chunks = config.parallel.pp, config.parallel.virtual_stages(config.model.num_layers)
    if chunks is None:
        return [min(pp - stage, microbatches)]
    group = config.parallel.microbatch_group_size_per_vp_stage or pp
    warmup = min((pp - stage - 1) * 2 + (chunks - 1) * group + 1, microbatches * chunks)
    order = [place // group % chunks for place in range(warmup)]
    return [order.count(chunk) for chunk in range(chunks)]
