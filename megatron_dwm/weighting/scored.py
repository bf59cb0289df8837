"""The base class of all weightings that compute weights from scores.

Shape legend: N samples of the global batch, n of this replica.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dwm.data.batch import Batch
from megatron_dwm.runtime.host_copy import HostCopy
from megatron_dwm.runtime.logging import LAST_RANK
from megatron_dwm.weighting.health import HealthWarning, check_weights
from megatron_dwm.weighting.policy import Record, SampleWeights, StepOutcome
from megatron_dwm.weighting.uniform import UniformWeighting
from megatron_dwm.weighting.weight_metrics import WeightMetrics
from megatron_dwm.weighting.weights import weights_from_scores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoringOptions:
    """How scores become weights, and when weights are checked."""

    temperature: float = 1.0
    min_effective_sample_size: float = 0.1
    """Fraction of the batch below which a warning is given (``--dwm-min-effective-sample-size``)."""
    check_interval: int = 100
    """Iterations between two checks of the weights (``--log-interval``)."""


class ScoredWeighting(UniformWeighting, ABC):
    """A weighting that gives each sample a score; the weights are the softmax of a batch's scores.

    A subclass must define :meth:`scores`. It overrides other methods if it prepares, learns, writes or saves something.
    """

    def __init__(self, weight_metrics: WeightMetrics, options: ScoringOptions) -> None:
        super().__init__()
        self.weight_metrics, self.options = weight_metrics, options
        self.sample_gather = weight_metrics.sample_gather

    @abstractmethod
    def scores(self, iteration: int, batch: Batch) -> torch.Tensor:
        """Return the scores of the global batch [N], on any device and the same on every rank."""

    def weigh(self, iteration: int, batch: Batch) -> SampleWeights | None:
        """Return N softmax(scores / temperature)."""
        scores = self.scores(iteration, batch)
        sample_weights = weights_from_scores(scores, self.options.temperature)
        return SampleWeights(
            self.sample_gather.select_replica(sample_weights).to(batch.tokens.device),
            HostCopy(torch.stack([scores.double(), sample_weights])),
            HostCopy(self.weight_metrics.sources_and_factors(batch)),
        )

    def after_step(
        self, iteration: int, batch: Batch, weights: SampleWeights | None, outcome: StepOutcome
    ) -> list[Record]:
        """Check whether the weights have collapsed, once every check interval."""
        if weights is None or iteration % self.options.check_interval:
            return []
        return self.health_records(iteration, weights)

    def health_records(self, iteration: int, weights: SampleWeights) -> list[Record]:
        """Log the health warnings of the weights, and return their records."""
        warnings = self.health_warnings(weights)
        for warning in warnings:
            logger.warning(f"iteration {iteration}: {warning.message}", extra=LAST_RANK)
        return [
            {"kind": "health", "iteration": iteration, "sign": warning.sign, "message": warning.message}
            for warning in warnings
        ]

    def health_warnings(self, weights: SampleWeights) -> list[HealthWarning]:
        """Return the health warnings of the weights of one batch."""
        return check_weights(weights.sample_weights, self.options.min_effective_sample_size)

    def metrics(self, iteration: int, batch: Batch, weights: SampleWeights | None) -> dict[str, Any]:
        """Return stage, metrics by source, and distance from uniform weights."""
        return self.weight_metrics(iteration, batch, weights)
