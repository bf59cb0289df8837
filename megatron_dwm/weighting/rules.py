"""Weights that follow a rule and are not learned for what they do: controls to compare with (docs/results.md).

Shape legend: N samples of the global batch, n of this replica.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """Samples of a high loss count for more: the language model's losses before the step, standardized."""

    def __init__(
        self,
        weight_metrics: WeightMetrics,
        options: ScoringOptions,
        strength: float,
        engine: PipelineEngine,
        micro_batch_size: int,
        flops_per_batch: float,
    ) -> None:
        """
        Args:
            strength: standard deviation of the scores.
            flops_per_batch: operations of the forward pass over a global batch that the losses need.
        """
        super().__init__(weight_metrics, options)
        self.strength, self.engine, self.micro_batch_size = strength, engine, micro_batch_size
        self.flops_per_batch = flops_per_batch

    def scores(self, iteration: int, batch: Batch) -> torch.Tensor:
        """Run the batch forward and standardize the samples' losses."""
        with torch.no_grad(), self.engine.full_parameters(), self.engine.deterministic():
            losses = self.engine.run(batch, self.micro_batch_size, forward_only=True)
        means = self.engine.broadcast_losses(losses, len(batch)).mean
        return self.strength * standardized(self.sample_gather.gather_from_replicas(means).cpu())

    def flops(self, iteration: int, outcome: StepOutcome) -> float:
        """Return the operations of the forward pass."""
        return self.flops_per_batch


class OracleWeighting(ScoredWeighting):
    """Only the samples of named sources count; uniform in a batch that has none of them."""

    def __init__(self, weight_metrics: WeightMetrics, options: ScoringOptions, sources: Sequence[str]) -> None:
        """
        Raises:
            UserError: none of ``sources`` is a source of the training data.
        """
        super().__init__(weight_metrics, options)
        unknown = [name for name in sources if name not in weight_metrics.sources]
        if unknown:
            raise UserError(
                f"--dwm-rule-sources {unknown[0]}: no source of the training data; name some of "
                f"{', '.join(weight_metrics.sources)}"
            )
        self._counting = torch.tensor([weight_metrics.sources.index(name) for name in sources])

    def scores(self, iteration: int, batch: Batch) -> torch.Tensor:
        """Return 0 for the samples that count and -inf for the others."""
        source = self.sample_gather.gather_from_replicas(batch.source).cpu()
        counts = torch.isin(source, self._counting)
        return torch.where(counts, 0.0, float("-inf")) if bool(counts.any()) else torch.zeros(len(source))


class ShuffledWeighting(BilevelWeighting):
    """A weighter that learns as ever, while each of its scores is given to another sample of the batch."""

    def __init__(self, weight_metrics: WeightMetrics, options: ScoringOptions, parts: BilevelParts, seed: int) -> None:
        super().__init__(weight_metrics, options, parts)
        self.seed = seed

    def scores(self, iteration: int, batch: Batch) -> torch.Tensor:
        """Return the weighter's scores in random order."""
        scores = super().scores(iteration, batch)
        return scores[torch.randperm(len(scores), generator=iteration_generator(self.seed, iteration))]


def iteration_generator(seed: int, iteration: int) -> torch.Generator:
    """Return a generator for one iteration, the same on every rank and in a resumed run."""
    return torch.Generator().manual_seed((seed << 32) + iteration)
