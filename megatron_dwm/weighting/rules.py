"""Weights that follow a fixed rule, for comparison with learned weights (docs/results.md).

Shape legend: N samples of the global batch, n of this replica.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from megatron_dwm.data.batch import Batch
from megatron_dwm.errors import UserError
from megatron_dwm.model.engine import PipelineEngine
from megatron_dwm.weighting.bilevel.weighting import BilevelParts, BilevelWeighting
from megatron_dwm.weighting.policy import StepOutcome
from megatron_dwm.weighting.scored import ScoredWeighting, ScoringOptions
from megatron_dwm.weighting.weight_metrics import WeightMetrics
from megatron_dwm.weighting.weights import standardized


class RandomWeighting(ScoredWeighting):
    """Normally distributed scores of standard deviation ``strength``."""

    def __init__(self, weight_metrics: WeightMetrics, options: ScoringOptions, strength: float, seed: int) -> None:
        super().__init__(weight_metrics, options)
        self.strength, self.seed = strength, seed

    def scores(self, iteration: int, batch: Batch) -> torch.Tensor:
        """Draw the scores of an iteration; a resumed run draws the same."""
        generator = iteration_generator(self.seed, iteration)
        samples = len(batch) * self.sample_gather.parallel_state.dp_size
        return self.strength * torch.randn(samples, generator=generator)


class LossWeighting(ScoredWeighting):
    """Samples count by the language model's losses before the step."""

    def __init__(
        self,
        weight_metrics: WeightMetrics,
        options: ScoringOptions,
        scores_of: Callable[[torch.Tensor], torch.Tensor],
        engine: PipelineEngine,
        micro_batch_size: int,
        flops_per_batch: float,
    ) -> None:
        """
        Args:
            scores_of: computes scores from the losses of the global batch [N].
            flops_per_batch: operations of the forward pass over a global batch for the losses.
        """
        super().__init__(weight_metrics, options)
        self.scores_of, self.engine, self.micro_batch_size = scores_of, engine, micro_batch_size
        self.flops_per_batch = flops_per_batch

    def scores(self, iteration: int, batch: Batch) -> torch.Tensor:
        """Compute scores from the losses of a forward pass over the batch."""
        with torch.no_grad(), self.engine.full_parameters(), self.engine.deterministic():
            losses = self.engine.run(batch, self.micro_batch_size, forward_only=True)
        means = self.engine.broadcast_losses(losses, len(batch)).mean
        return self.scores_of(self.sample_gather.gather_from_replicas(means).cpu())

    def flops(self, iteration: int, outcome: StepOutcome) -> float:
        """Return the operations of the forward pass."""
        return self.flops_per_batch


class OracleWeighting(ScoredWeighting):
    """Only the samples of named sources count; a batch without any of them has uniform weights."""

    def __init__(self, weight_metrics: WeightMetrics, options: ScoringOptions, sources: Sequence[str]) -> None:
        """
        Raises:
            UserError: one of ``sources`` is not a source of the training data.
        """
        super().__init__(weight_metrics, options)
        self._selected_sources = torch.tensor(source_numbers(weight_metrics, sources))

    def scores(self, iteration: int, batch: Batch) -> torch.Tensor:
        """Return 0 for the samples that count and -inf for the others."""
        source = self.sample_gather.gather_from_replicas(batch.source).cpu()
        return _scores_of_selected(torch.isin(source, self._selected_sources))


class SourceWeighting(ScoredWeighting):
    """Each source has a fixed weight, 1 if it is not named; a batch's weights are scaled to the mean 1, as always."""

    def __init__(
        self,
        weight_metrics: WeightMetrics,
        options: ScoringOptions,
        sources: Sequence[str],
        source_weights: Sequence[float],
    ) -> None:
        """
        Raises:
            UserError: one of ``sources`` is not a source of the training data.
        """
        super().__init__(weight_metrics, options)
        self._scores = torch.zeros(len(weight_metrics.sources), dtype=torch.float64)
        logs = torch.tensor(source_weights, dtype=torch.float64).log()
        self._scores[source_numbers(weight_metrics, sources)] = options.temperature * logs

    def scores(self, iteration: int, batch: Batch) -> torch.Tensor:
        """Return the logarithm of each sample's source's weight, times the temperature."""
        return self._scores[self.sample_gather.gather_from_replicas(batch.source).cpu()]


class RandomHalfWeighting(ScoredWeighting):
    """A random half of the training samples counts, the other half does not."""

    def __init__(self, weight_metrics: WeightMetrics, options: ScoringOptions, seed: int) -> None:
        """
        Args:
            seed: determines the half, which does not depend on the layout or the order of the data.
        """
        super().__init__(weight_metrics, options)
        self.seed = seed

    def scores(self, iteration: int, batch: Batch) -> torch.Tensor:
        """Return 0 for the samples of the half and -inf for the others; all 0 in a batch without any of them."""
        index = self.sample_gather.gather_from_replicas(batch.index).cpu()
        return _scores_of_selected(torch.from_numpy(half_of_samples(index.numpy(), self.seed)))


class ShuffledWeighting(BilevelWeighting):
    """A weighter that is trained as usual, but whose scores are permuted among the samples of the batch."""

    def __init__(self, weight_metrics: WeightMetrics, options: ScoringOptions, parts: BilevelParts, seed: int) -> None:
        super().__init__(weight_metrics, options, parts)
        self.seed = seed

    def scores(self, iteration: int, batch: Batch) -> torch.Tensor:
        """Return the weighter's scores in random order."""
        scores = super().scores(iteration, batch)
        return scores[torch.randperm(len(scores), generator=iteration_generator(self.seed, iteration))]


def source_numbers(weight_metrics: WeightMetrics, sources: Sequence[str]) -> list[int]:
    """Return the indices of ``sources`` among those of the training data.

    Raises:
        UserError: one of them does not exist.
    """
    known = weight_metrics.sources
    if unknown := [name for name in sources if name not in known]:
        raise UserError(
            f"--dwm-rule-sources {unknown[0]}: no source of the training data; name some of {', '.join(known)}"
        )
    return [known.index(name) for name in sources]


def _scores_of_selected(is_selected: torch.Tensor) -> torch.Tensor:
    """Return 0 for the samples that count and -inf for the others [N]; all 0 if none of the batch counts."""
    return torch.where(is_selected, 0.0, float("-inf")) if bool(is_selected.any()) else torch.zeros(len(is_selected))


def half_of_samples(index: np.ndarray, seed: int) -> np.ndarray:
    """Return whether each sample of the training data, by index, is in the random half of ``seed``."""
    mixed = index.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the finalizer of SplitMix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray((mixed >> np.uint64(40)) % np.uint64(2) == 0)


def high_loss_scores(losses: torch.Tensor, strength: float) -> torch.Tensor:
    """Return standardized losses [N] times ``strength``: the higher a sample's loss, the more it counts."""
    return strength * standardized(losses)


def linupper_scores(losses: torch.Tensor) -> torch.Tensor:
    """Return the scores [N] of LinUpper (Sow et al., "Dynamic Loss-Based Sample Reweighting", ICLR 2025).

    Losses are scaled to h in [-1, 1] between the batch's smallest and largest, and the score is min(h + 1, 1): it rises
    up to the middle and is constant above. The paper's r is the temperature of the softmax.
    """
    low, high = losses.double().aminmax()
    if low == high:
        return torch.zeros(len(losses), dtype=torch.float64)
    scaled = (2 * losses.double() - low - high) / (high - low)
    return (scaled + 1).clamp(max=1.0)


def iteration_generator(seed: int, iteration: int) -> torch.Generator:
    """Return a generator for one iteration, the same on every rank and in a resumed run."""
    return torch.Generator().manual_seed((seed << 32) + iteration)
