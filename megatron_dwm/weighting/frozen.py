"""Weights of a trained weighter that does not change, or of a separate one for each stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dwm.data.batch import Batch
from megatron_dwm.weighting.export import WeighterExporter
from megatron_dwm.weighting.policy import SampleWeights, State, StepOutcome
from megatron_dwm.weighting.score_cache import ScoreCache
from megatron_dwm.weighting.scored import ScoredWeighting, ScoringOptions
from megatron_dwm.weighting.weight_metrics import WeightMetrics
from megatron_dwm.weighting.weighter import Weighter, scoring_digest, weighter_state
from megatron_dwm.weighting.weighter_stages import WeighterStage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrozenParts:
    """The parts of frozen weighting."""

    stages: Sequence[WeighterStage]
    read_weighter: Callable[[WeighterStage], Weighter]
    """Reads the weighter of a stage from its folder."""
    exporter: WeighterExporter
    max_cached_scores: int
    scoring_flops: Callable[[Weighter], float]
    """Returns the operations of scoring one global batch."""


class FrozenWeighting(ScoredWeighting):
    """Scores batches with a weighter, and exports it with the run's checkpoints."""

    def __init__(
        self, weight_metrics: WeightMetrics, options: ScoringOptions, parts: FrozenParts, iteration: int
    ) -> None:
        """
        Args:
            iteration: the first weighted iteration.
        """
        super().__init__(weight_metrics, options)
        self.parts, self.exporter = parts, parts.exporter
        self.cache = ScoreCache(parts.max_cached_scores)
        self.stage = self._stage_of(iteration)
        self.weighter = parts.read_weighter(self.stage)

    def before_step(self, iteration: int) -> None:
        """Switch to the next stage's weighter at the beginning of the stage."""
        stage = self._stage_of(iteration)
        if stage == self.stage:
            return
        self.stage, self.weighter = stage, self.parts.read_weighter(stage)
        self.cache.clear()
        logger.info(f" > iteration {iteration}: the weighter of stage {stage.number}, {stage.folder}")

    def scores(self, iteration: int, batch: Batch) -> torch.Tensor:
        """Score this rank's part of the replica's samples, except for cached scores, and gather all scores."""
        if not self.cache.max_samples:
            return self.sample_gather.score(batch.tokens, self.weighter.score)
        tokens = batch.tokens[self.sample_gather.rank_slice(len(batch))]
        return self.cache.score(tokens, len(batch), self.weighter.score, self.sample_gather)

    def metrics(self, iteration: int, batch: Batch, weights: SampleWeights | None) -> dict[str, Any]:
        """Return the metrics of the weights, and the stage that the weighter comes from."""
        return super().metrics(iteration, batch, weights) | {"stage": self.stage.number}

    def flops(self, iteration: int, outcome: StepOutcome) -> float:
        """Return the operations of one forward pass of the weighter over the batch."""
        return self.parts.scoring_flops(self.weighter)

    def before_save(self, iteration: int) -> None:
        """Export the weighter."""
        self.exporter.export(self.weighter, iteration, self.stage.number)

    def state_dict(self) -> State:
        """Return the loaded state of a trained weighter, or else this weighter's, and the cached scores."""
        cached = {"score_cache": {"weighter": self._digest(), **self.cache.state()}}
        if self._state.get("outer_updates"):
            return {**self._state, **cached}
        state = {"consumed_target_samples": 0, "outer_updates": 0, **weighter_state(self.weighter), "replay": []}
        return {**state, **cached}

    def load_state_dict(self, state: State) -> None:
        """Keep ``state``, and use its cached scores if they are from this weighter."""
        cached = state.get("score_cache")
        super().load_state_dict(state)
        if cached is not None and cached["weighter"] == self._digest():
            self.cache.load(cached)

    def _digest(self) -> str:
        return scoring_digest(self.weighter.model, self.weighter.tokenizer_digest)

    def _stage_of(self, iteration: int) -> WeighterStage:
        stages = self.parts.stages
        return next((stage for stage in stages if iteration <= stage.last_iteration), stages[-1])
