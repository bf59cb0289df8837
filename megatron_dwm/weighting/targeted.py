"""Rules that use the target set but train no weighter, for comparison (docs/results.md).

Shape legend: N samples of the global batch, n of this replica, h hidden size of the language model.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dwm.data.batch import Batch
from megatron_dwm.data.loader import BatchLoader
from megatron_dwm.model.engine import PipelineEngine
from megatron_dwm.model.hidden_states import mean_hidden_states
from megatron_dwm.model.parameter_copy import ParameterCopy
from megatron_dwm.weighting.bilevel.alignment_pass import AlignmentPass, reason_unchanged
from megatron_dwm.weighting.bilevel.lm_gradients import LMGradients
from megatron_dwm.weighting.bilevel.preconditioner import is_preconditioner_known
from megatron_dwm.weighting.policy import Record, SampleWeights, State, StepOutcome
from megatron_dwm.weighting.scored import ScoredWeighting, ScoringOptions
from megatron_dwm.weighting.source_means import SourceMeans
from megatron_dwm.weighting.weight_metrics import WeightMetrics
from megatron_dwm.weighting.weights import standardized


@dataclass(frozen=True)
class TargetedParts:
    """The parts of these rules."""

    engine: PipelineEngine
    lm_gradients: LMGradients
    make_target_loader: Callable[[int], BatchLoader]
    """Returns a loader of the target set, after a number of consumed samples."""
    micro_batch_size: int
    flops_per_batch: float
    """Operations for a training batch."""
    flops_per_target: float
    """Operations for a target batch."""


class TargetedWeighting(ScoredWeighting, ABC):
    """A rule that reads the target set, and continues where an earlier run stopped."""

    def __init__(self, weight_metrics: WeightMetrics, options: ScoringOptions, parts: TargetedParts) -> None:
        super().__init__(weight_metrics, options)
        self.parts, self.stages = parts, weight_metrics.stages
        self.consumed_target_samples = 0
        self._target_loader: BatchLoader | None = None

    def next_target(self) -> Batch:
        """Return the next batch of the target set; every rank calls it."""
        if self._target_loader is None:
            self._target_loader = self.parts.make_target_loader(self.consumed_target_samples)
        self.consumed_target_samples += self._target_loader.partition.global_samples
        return self._target_loader.next_batch()

    def state_dict(self) -> State:
        """Return the loaded state, with the number of samples read since."""
        return {**super().state_dict(), "consumed_target_samples": self.consumed_target_samples}

    def load_state_dict(self, state: State) -> None:
        """Continue reading where ``state`` ends."""
        super().load_state_dict(state)
        self.consumed_target_samples = state.get("consumed_target_samples", 0)


class SimilarityWeighting(TargetedWeighting):
    """Samples whose hidden states are similar to the target set's count for more.

    The score is the cosine of a sample's mean hidden state with the target's, at the current parameters, standardized
    over the batch. The target's is the mean over a target batch; it is renewed when a weighter would be updated.
    """

    def __init__(
        self, weight_metrics: WeightMetrics, options: ScoringOptions, parts: TargetedParts, strength: float
    ) -> None:
        """
        Args:
            strength: standard deviation of the scores.
        """
        super().__init__(weight_metrics, options, parts)
        self.strength = strength
        self._target: torch.Tensor | None = None  # [h]

    def scores(self, iteration: int, batch: Batch) -> torch.Tensor:
        """Compute the batch's hidden states, and sometimes the target's, and compare them."""
        target = self._target
        if target is None or self.stages.is_update(iteration):
            self._target = target = self._mean_over_replicas(self._hidden_states(self.next_target()))
        hidden = self.sample_gather.gather_from_replicas(self._hidden_states(batch)).cpu()
        return self.strength * standardized(similarities(hidden, target))

    def flops(self, iteration: int, outcome: StepOutcome) -> float:
        """Return the operations of the forward passes."""
        return self.parts.flops_per_batch + self.parts.flops_per_target * self.stages.is_update(iteration)

    def state_dict(self) -> State:
        """Return the state, including the target's hidden state."""
        return {**super().state_dict(), "target_hidden_state": self._target}

    def load_state_dict(self, state: State) -> None:
        """Continue with the target's hidden state."""
        super().load_state_dict(state)
        self._target = state.get("target_hidden_state")

    def _hidden_states(self, batch: Batch) -> torch.Tensor:
        return mean_hidden_states(self.parts.engine, batch, min(self.parts.micro_batch_size, len(batch)))

    def _mean_over_replicas(self, hidden: torch.Tensor) -> torch.Tensor:
        mean, state = hidden.mean(dim=0), self.sample_gather.parallel_state
        dist.all_reduce(mean, group=state.dp_group)
        return mean.cpu() / state.dp_size


class SourceAlignmentWeighting(TargetedWeighting):
    """Sources whose samples align with the target count for more: the method with weights per source.

    After each step that an outer update would follow, the step's samples are aligned as in an update. A source's
    score is the mean of its standardized alignments in all batches so far, divided by the KL weight: the optimum of the
    weighter's objective if a sample's source were its only feature.
    """

    def __init__(
        self,
        weight_metrics: WeightMetrics,
        options: ScoringOptions,
        parts: TargetedParts,
        kl_weight: float,
        clip: float,
    ) -> None:
        """
        Args:
            kl_weight: strength of the KL term.
            clip: clip standardized alignments at this many standard deviations; 0 for no clipping.
        """
        super().__init__(weight_metrics, options, parts)
        self.kl_weight, self.clip = kl_weight, clip
        self._pass = AlignmentPass(parts.lm_gradients, self.sample_gather)
        self._old_parameters = ParameterCopy(parts.engine.chunks)
        self._alignments = SourceMeans(weight_metrics.sources)

    def before_step(self, iteration: int) -> None:
        """Copy the parameters if alignments follow; gathers shards over the data-parallel group."""
        if self.stages.is_update(iteration):
            self._old_parameters.store()

    def scores(self, iteration: int, batch: Batch) -> torch.Tensor:
        """Return the score of each sample's source; all 0 before the first alignments."""
        by_source = self.options.temperature / self.kl_weight * self._alignments.means()
        return by_source[self.sample_gather.gather_from_replicas(batch.source).cpu()]

    def after_step(
        self, iteration: int, batch: Batch, weights: SampleWeights | None, outcome: StepOutcome
    ) -> list[Record]:
        """Align the step's samples if that is due, unless the step changed no parameter."""
        records = super().after_step(iteration, batch, weights, outcome)
        if self._is_alignment_due(iteration, outcome):
            with self.parts.engine.full_parameters():
                found = self._pass.run(batch, self.next_target(), self._old_parameters)
            if found is not None:
                source = self.sample_gather.gather_from_replicas(batch.source).cpu()
                self._alignments.add(source, standardized(found.values, self.clip))
        self._old_parameters.release()
        return records

    def flops(self, iteration: int, outcome: StepOutcome) -> float:
        """Return the operations of the passes in iterations that make them."""
        return (self.parts.flops_per_batch + self.parts.flops_per_target) * self._is_alignment_due(iteration, outcome)

    def state_dict(self) -> State:
        """Return the state with the sums of alignments by source."""
        return {**super().state_dict(), "source_alignments": self._alignments.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Continue with the sources' sums."""
        super().load_state_dict(state)
        self._alignments.load_state_dict(state.get("source_alignments", {}))

    def _is_alignment_due(self, iteration: int, outcome: StepOutcome) -> bool:
        return self.stages.is_update(iteration) and reason_unchanged(outcome) is None


class TopAlignmentWeighting(TargetedWeighting):
    """Only the samples of each batch that align best with the target, before its step, count.

    Both gradients are taken at the parameters before the step, in every step. Until the preconditioner is known, after
    the first step, all samples count.
    """

    def __init__(
        self, weight_metrics: WeightMetrics, options: ScoringOptions, parts: TargetedParts, fraction: float
    ) -> None:
        """
        Args:
            fraction: fraction of the batch that counts.
        """
        super().__init__(weight_metrics, options, parts)
        self.fraction = fraction
        self._pass = AlignmentPass(parts.lm_gradients, self.sample_gather)

    def scores(self, iteration: int, batch: Batch) -> torch.Tensor:
        """Align the batch at the current parameters, and return 0 for the samples that count and -inf for others."""
        lm_gradients, target = self.parts.lm_gradients, self.next_target()
        is_adam = lm_gradients.config.dwm_preconditioner == "adam"
        found = None
        if not is_adam or is_preconditioner_known(lm_gradients.optimizer):
            with self.parts.engine.full_parameters():
                found = self._pass.run(batch, target)
        samples = len(batch) * self.sample_gather.parallel_state.dp_size
        return torch.zeros(samples) if found is None else top_scores(found.values, self.fraction)

    def flops(self, iteration: int, outcome: StepOutcome) -> float:
        """Return the operations of the passes."""
        return self.parts.flops_per_batch + self.parts.flops_per_target


def similarities(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the cosine of each sample's hidden state [N, h] with the target's [h], float64 [N]."""
    return torch.nn.functional.cosine_similarity(hidden.double(), target.double()[None], dim=1)


def top_scores(alignments: torch.Tensor, fraction: float) -> torch.Tensor:
    """Return 0 for the ``fraction`` of samples [N] with the highest alignments (at least one), and -inf for others."""
    count = max(1, round(fraction * len(alignments)))
    scores = torch.full_like(alignments, float("-inf"))
    scores[alignments.topk(count).indices] = 0.0
    return scores
