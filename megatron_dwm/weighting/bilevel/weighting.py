"""Weights from a weighter that is trained during the run: the bi-level method (docs/method.md).

Shape legend: N samples of the global batch, n of this replica.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch

from megatron_dwm.data.batch import Batch
from megatron_dwm.data.loader import BatchLoader
from megatron_dwm.model.engine import PipelineEngine
from megatron_dwm.model.parameter_copy import ParameterCopy
from megatron_dwm.weighting.bilevel.alignment_pass import reason_unchanged
from megatron_dwm.weighting.bilevel.gradient_mean import GradientAverage
from megatron_dwm.weighting.bilevel.lm_gradients import LMGradients
from megatron_dwm.weighting.bilevel.outer_update import OuterResult, OuterUpdate
from megatron_dwm.weighting.bilevel.source_offsets import SourceOffsets
from megatron_dwm.weighting.export import WeighterExporter
from megatron_dwm.weighting.health import HealthWarning, check_scores
from megatron_dwm.weighting.policy import PER_PARAMETER, Record, SampleWeights, State, StepOutcome
from megatron_dwm.weighting.scored import ScoredWeighting, ScoringOptions
from megatron_dwm.weighting.weight_metrics import WeightMetrics
from megatron_dwm.weighting.weighter import Weighter, weighter_state
from megatron_dwm.weighting.weights import WeightStatistics

logger = logging.getLogger(__name__)

TARGET_GRADIENT = "target_gradient"
"""Name of the target gradient's running mean among the per-parameter tensors of a checkpoint."""


@dataclass(frozen=True)
class BilevelFlops:
    """Operations of all ranks that weighting adds to plain training."""

    per_batch: float
    """Operations of scoring one global batch."""
    per_update: float
    """Operations of one outer update."""


@dataclass(frozen=True)
class BilevelParts:
    """The parts of bilevel weighting."""

    engine: PipelineEngine
    weighter: Weighter
    outer_update: OuterUpdate[LMGradients]
    target_loader: BatchLoader
    exporter: WeighterExporter
    flops: BilevelFlops
    gradient_mean: GradientAverage
    """Running mean of the target gradient over updates."""
    source_offsets: SourceOffsets | None = None
    """Offsets of scores by source; None without."""


class BilevelWeighting(ScoredWeighting):
    """Scores batches with a weighter, and updates it from the alignment of samples with the target set.

    If an outer update follows a step, the language model's parameters are copied before the step.
    """

    def __init__(self, weight_metrics: WeightMetrics, options: ScoringOptions, parts: BilevelParts) -> None:
        super().__init__(weight_metrics, options)
        self.engine, self.weighter, self.outer_update = parts.engine, parts.weighter, parts.outer_update
        self.target_loader, self.exporter, self._flops = parts.target_loader, parts.exporter, parts.flops
        self.gradient_mean, self.source_offsets = parts.gradient_mean, parts.source_offsets
        self.stages, self.sources = weight_metrics.stages, weight_metrics.sources
        self.consumed_target_samples = 0
        self.num_updates = 0
        self._old_parameters = ParameterCopy(parts.engine.chunks)

    def before_step(self, iteration: int) -> None:
        """Copy the parameters if an outer update follows; gathers shards over the data-parallel group."""
        if self.stages.is_update(iteration):
            self._old_parameters.store()

    def scores(self, iteration: int, batch: Batch) -> torch.Tensor:
        """Score this rank's part of the replica's samples, gather all scores, and add the offsets of their sources."""
        scores = self.sample_gather.score(batch.tokens, self.weighter.score)
        if self.source_offsets is None:
            return scores
        return scores + self.source_offsets.of(self.sample_gather.gather_from_replicas(batch.source))

    def after_step(
        self, iteration: int, batch: Batch, weights: SampleWeights | None, outcome: StepOutcome
    ) -> list[Record]:
        """Make the outer update if it is due, and export the weighter at the end of a stage.

        A step that changed no parameter provides no information on its weights: the update that was due is skipped,
        with a log line.
        """
        if weights is None:
            return []
        is_update, reason = self.stages.is_update(iteration), reason_unchanged(outcome)
        should_check = is_update or iteration % self.options.check_interval == 0
        records = self.health_records(iteration, weights) if should_check else []
        if is_update and reason is not None:
            records.append(self._skip_update(iteration, reason))
        elif is_update:
            with self.engine.full_parameters():
                records.append(self._update(iteration, batch, weights, outcome))
        self._old_parameters.release()
        if self.stages.is_stage_end(iteration):
            self.exporter.export(self.weighter, iteration, self.stages.stage(iteration))
        return records

    def health_warnings(self, weights: SampleWeights) -> list[HealthWarning]:
        """Return the health warnings of the weights of one batch, including equal scores after updates."""
        return super().health_warnings(weights) + check_scores(weights.scores, self.num_updates)

    def flops(self, iteration: int, outcome: StepOutcome) -> float:
        """Return the operations of scoring, and of the outer update if one was made."""
        is_update = self.stages.is_update(iteration) and reason_unchanged(outcome) is None
        return self._flops.per_batch + (self._flops.per_update if is_update else 0.0)

    def before_save(self, iteration: int) -> None:
        """Export the weighter."""
        self.exporter.export(self.weighter, iteration, self.stages.stage(iteration))

    def state_dict(self) -> State:
        """Return the weighter, its optimizer, the replay in global order, the averages, and the sample counts."""
        mean = self.gradient_mean.state()
        return {
            "consumed_target_samples": self.consumed_target_samples,
            "outer_updates": self.num_updates,
            **weighter_state(self.weighter),
            **self.outer_update.state_dict(),
            **({} if mean is None else {"target_gradients": mean[0], PER_PARAMETER: {TARGET_GRADIENT: mean[1]}}),
            **({} if self.source_offsets is None else {"source_offsets": self.source_offsets.state_dict()}),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue with the replay and the counts of ``state``; the weighter has already been created from it."""
        self.consumed_target_samples = state["consumed_target_samples"]
        self.num_updates = state["outer_updates"]
        self.outer_update.load_state_dict(state, self.num_updates)
        per_parameter = state.get(PER_PARAMETER, {})
        if TARGET_GRADIENT in per_parameter:
            self.gradient_mean.load(state["target_gradients"], per_parameter[TARGET_GRADIENT])
        if self.source_offsets is not None:
            self.source_offsets.load_state_dict(state.get("source_offsets", {}))

    def _update(self, iteration: int, batch: Batch, weights: SampleWeights, outcome: StepOutcome) -> Record:
        target = self.target_loader.next_batch()
        self.consumed_target_samples += self.target_loader.partition.global_samples
        result = self.outer_update.run(batch, target, self._old_parameters)
        if result is None:
            reason = f"an alignment is not finite at loss scale {self.outer_update.loss_scale:g}"
            return self._skip_update(iteration, reason)
        self.num_updates += 1
        losses = self.engine.broadcast_losses(outcome.sample_losses, len(batch)).mean
        # In one tensor, with losses reinterpreted as integers, so that the host reads only once.
        columns = torch.stack([batch.index, batch.source, losses.double().view(torch.int64)], dim=1)
        index, source, loss = self.sample_gather.gather_from_replicas(columns).cpu().unbind(1)
        if self.source_offsets is not None:
            self.source_offsets.learn(source, weights.scores, result.alignments)
        samples = {
            "index": index.tolist(),
            "source": [self.sources[n] for n in source.tolist()],
            "score": weights.scores.tolist(),
            "weight": weights.sample_weights.tolist(),
            "alignment": result.alignments.tolist(),
            "loss": loss.contiguous().view(torch.float64).tolist(),
        }
        return self._record(iteration, weights, result, samples)

    def _skip_update(self, iteration: int, reason: str) -> Record:
        logger.info(f" > outer update of iteration {iteration} skipped: {reason}")
        stage = self.stages.stage(iteration)
        return {"kind": "skipped_outer_update", "iteration": iteration, "stage": stage, "reason": reason}

    def _record(
        self, iteration: int, weights: SampleWeights, result: OuterResult, samples: dict[str, list[Any]]
    ) -> Record:
        return {
            "kind": "outer_update",
            "iteration": iteration,
            "stage": self.stages.stage(iteration),
            "target_loss": result.target_loss,
            **asdict(WeightStatistics.of(weights.sample_weights)),
            "objective_before": result.objective_before,
            "objective_after": result.objective_after,
            "weighter_grad_norm": result.weighter_grad_norm,
            "weighter_hash": result.weighter_hash,
            "alignment_by_source": self._means(samples["alignment"], samples["source"]),
            **({} if self.source_offsets is None else {"offset_by_source": self.source_offsets.by_source()}),
            "samples": samples,
        }

    def _means(self, values: list[float], sources: list[str]) -> dict[str, float]:
        """Return the mean of the values of each source that occurs."""
        by_source: dict[str, list[float]] = {name: [] for name in self.sources}
        for value, source in zip(values, sources, strict=True):
            by_source[source].append(value)
        return {name: fmean(found) for name, found in by_source.items() if found}
