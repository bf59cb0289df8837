"""Metrics of a step's weights, for the log and the records.

Shape legend: N samples of the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from megatron_dwm.data.batch import Batch
from megatron_dwm.weighting.loss_factors import LossFactors
from megatron_dwm.weighting.policy import SampleWeights
from megatron_dwm.weighting.sample_gather import SampleGather
from megatron_dwm.weighting.stage_schedule import StageSchedule
from megatron_dwm.weighting.weights import WeightStatistics


class WeightMetrics:
    """Computes the metrics of each step's weights: stage, values by source, and distance from uniform weights."""

    def __init__(
        self,
        stages: StageSchedule,
        sample_gather: SampleGather,
        loss_factors: LossFactors,
        sources: Sequence[str],
    ) -> None:
        """
        Args:
            sources: names of the training data's sources, by ``Batch.source``.
        """
        self.stages, self.sample_gather, self.loss_factors = stages, sample_gather, loss_factors
        self.sources = list(sources)

    def __call__(self, iteration: int, batch: Batch, weights: SampleWeights | None) -> dict[str, Any]:
        """Return the metrics of one step; without weights it gathers over the data-parallel group.

        ``share_by_source`` is the fraction of the training loss that comes from a source's samples: Σ w f over them,
        with the factors f by which samples count (their tokens). ``fraction_by_source`` is the same without weights,
        Σ f. ``weight_by_source`` is the mean weight of a source's samples, if it has any in the batch.
        """
        if weights is not None:
            source, factors = weights.sources_and_factors.read().unbind(1)
            values = weights.sample_weights
        else:
            source, factors = self.sources_and_factors(batch).cpu().unbind(1)
            values = torch.ones_like(factors)
        of_source = {name: source == number for number, name in enumerate(self.sources)}

        def fractions(counts: torch.Tensor) -> dict[str, float]:
            return {name: float(counts[members].sum()) / len(source) for name, members in of_source.items()}

        figures: dict[str, Any] = {
            "stage": self.stages.stage(iteration),
            "share_by_source": fractions(values * factors),
            "fraction_by_source": fractions(factors),
        }
        if weights is None:
            return figures
        present = {name: members for name, members in of_source.items() if bool(members.any())}
        figures["weight_by_source"] = {name: float(values[members].mean()) for name, members in present.items()}
        return figures | asdict(WeightStatistics.of(values))

    def sources_and_factors(self, batch: Batch) -> torch.Tensor:
        """Return the source and the loss factor of each sample [N, 2], float64; gathers over the data-parallel group.

        If losses are counted per token it reduces over that group before.
        """
        return self.sample_gather.gather_from_replicas(
            torch.stack([batch.source.double(), self.loss_factors(batch)], dim=1)
        )
