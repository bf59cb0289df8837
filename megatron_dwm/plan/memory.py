"""The memory of a run's stages, computed from one microbatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.config.run_sizes import RunSizes
from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.plan.stage import Pass, Stage
from megatron_dwm.plan.weighter import WeighterPlan


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a pipeline stage."""

    stage: int
    layers: int
    parameters: int
    """Number of parameters."""
    weights: int
    gradients: int
    optimizer: int
    activations: float
    """Peak of the activations in a training step."""
    weighting_between_updates: int
    """The weighter, the replay, and the running mean of the target gradient."""
    weighting_in_update: float
    """What an outer update adds to the peak of plain training, beyond the memory held between updates."""

    @property
    def plain(self) -> float:
        """The peak of plain training."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def peak(self) -> float:
        """The peak of the run."""
        return self.plain + self.weighting_between_updates + self.weighting_in_update


def stage_memory(
    parallel: ParallelConfig, weighting: WeightingConfig, sizes: RunSizes, stage: Stage, weighter: WeighterPlan | None
) -> StageMemory:
    """Return the memory of a stage, with the schedule's microbatches in flight."""
    microbatches = sizes.num_microbatches
    counts = in_flight(parallel, sizes.virtual_stages, stage.number, microbatches)
    training = held_activations(stage.training, counts) + stage.workspace
    added = 0.0
    held = weighter.held if weighter is not None else 0
    if weighting.target_momentum > 0:
        held += stage.gradient_mean
    if weighting.needs_alignments:
        samples = sizes.micro_batch_size if weighting.dwm_alignment == "single-sample" else 1
        counts = in_flight(parallel, sizes.virtual_stages, stage.number, microbatches * samples)
        added = _update_peak(weighting, stage, training, counts, weighter) - training
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


def _update_peak(
    weighting: WeightingConfig, stage: Stage, training: float, counts: Sequence[int], weighter: WeighterPlan | None
) -> float:
    """Return the peak bytes of an iteration with an outer update, without weights, gradients and optimizer.

    Args:
        training: the peak of the activations in the training step.
        counts: each chunk's microbatches in flight in the alignment pass.
    """
    # The top-alignment rule stays at the same parameters.
    copy = 0 if weighting.dwm_rule == "top-alignment" else stage.parameter_copy
    direction, learning = stage.direction, 0 if weighter is None else weighter.learning
    if weighting.dwm_alignment == "finite-difference":
        # Without a backward pass, but with a second copy of the parameters.
        alignment = max(part.peak for part in stage.alignment) + copy + stage.workspace
    else:
        alignment = held_activations(stage.alignment, counts) + stage.workspace
    preconditioner = stage.preconditioner if weighting.dwm_preconditioner == "adam" else 0
    # The copy is made before the training step and held in all passes; v is held after the target pass.
    return max(copy + training, copy + direction + preconditioner, copy + direction + alignment, learning)


def held_activations(passes: Sequence[Pass], counts: Sequence[int]) -> float:
    """Return the peak bytes of activations, from each chunk's pass and number of microbatches in flight."""
    kept = sum(part.kept * count for part, count in zip(passes, counts, strict=True))
    return kept + max(part.peak - part.kept for part in passes)


def in_flight(parallel: ParallelConfig, chunks: int | None, stage: int, microbatches: int) -> list[int]:
    """Return the maximum number of microbatches of each model chunk that wait for their backward pass.

    megatron-core's schedules run this many forward passes before the first backward pass, and then one of each in turn.

    Args:
        chunks: model chunks of a rank; None without the interleaved schedule.
        stage: the number of the pipeline stage.
        microbatches: microbatches of one pass over a batch.
    """
    pp = parallel.pp
    if chunks is None:
        return [min(pp - stage, microbatches)]
    group = parallel.microbatch_group_size_per_vp_stage or pp
    warmup = min((pp - stage - 1) * 2 + (chunks - 1) * group + 1, microbatches * chunks)
    order = [place // group % chunks for place in range(warmup)]
    return [order.count(chunk) for chunk in range(chunks)]
