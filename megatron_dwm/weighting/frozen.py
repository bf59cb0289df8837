"""Weights of a trained weighter that does not change."""

from __future__ import annotations

import torch

from megatron_dwm.data.batch import Batch
from megatron_dwm.weighting.export import WeighterExporter
from megatron_dwm.weighting.policy import State, StepOutcome
from megatron_dwm.weighting.scored import ScoredWeighting, ScoringOptions
from megatron_dwm.weighting.weight_metrics import WeightMetrics
from megatron_dwm.weighting.weighter import Weighter, weighter_state


class FrozenWeighting(ScoredWeighting):
    """Scores batches with a weighter, and exports it beside the run's checkpoints."""

    def __init__(
        self,
        weight_metrics: WeightMetrics,
        options: ScoringOptions,
        weighter: Weighter,
        exporter: WeighterExporter,
        flops_per_batch: float,
    ) -> None:
        """
        Args:
            flops_per_batch: operations of scoring one global batch.
        """
        super().__init__(weight_metrics, options)
        self.weighter, self.exporter, self.flops_per_batch = weighter, exporter, flops_per_batch
        self.stages = weight_metrics.stages

    def scores(self, iteration: int, batch: Batch) -> torch.Tensor:
        """Let each rank score its part of the replica's samples, and gather."""
        rank_scores = self.weighter.score(batch.tokens[self.sample_gather.rank_slice_of(len(batch))])
        return self.sample_gather.gather_from_ranks(rank_scores, len(batch)).cpu()

    def flops(self, iteration: int, outcome: StepOutcome) -> float:
        """Return the operations of one forward pass of the weighter over the batch."""
        return self.flops_per_batch

    def before_save(self, iteration: int) -> None:
        """Export the weighter."""
        self.exporter.export(self.weighter, iteration, self.stages.stage(iteration))

    def state_dict(self) -> State:
        """Return the weighter's state; that of a weighter that has learned is kept for the next bilevel run instead."""
        if self._state.get("outer_updates"):
            return self._state
        return {"consumed_target_samples": 0, "outer_updates": 0, **weighter_state(self.weighter), "replay": []}
