"""The data weighting model's place in a run: what the training loop calls.

Shape legend: N samples of the global batch, n of this replica.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.data.batch import Batch
from megatron_dwm.data.loader import BatchLoader
from megatron_dwm.model.engine import SampleLosses
from megatron_dwm.model.parameter_copy import ParameterCopy
from megatron_dwm.runtime.record_writers import say
from megatron_dwm.weighting.bilevel.health import HealthWarning, check_scores, check_weights
from megatron_dwm.weighting.bilevel.outer_update import AlignedBatch, OuterResult, OuterUpdate
from megatron_dwm.weighting.sample_gather import SampleGather
from megatron_dwm.weighting.stage_schedule import StageSchedule
from megatron_dwm.weighting.weighter import Weighter
from megatron_dwm.weighting.weights import WeightStatistics, weights_from_scores


@dataclass(frozen=True)
class SampleWeights:
    """The weights of one step's samples."""

    scores: torch.Tensor
    """[N], global order."""
    relative: torch.Tensor
    """u = N w of the whole batch [N], float64."""
    own: torch.Tensor
    """u of this replica's samples [n]."""


class DataWeighting:
    """Weighs batches and, in bilevel mode, learns to.

    The weighter comes to life at the end of the warm-up, or is loaded before the first step.
    """

    def __init__(
        self,
        config: WeightingConfig,
        stages: StageSchedule,
        sample_gather: SampleGather,
        sources: list[str],
        make_weighter: Callable[[], Weighter],
        make_outer_update: Callable[[Weighter], OuterUpdate] | None,
        target_loader: BatchLoader | None,
    ) -> None:
        """
        Args:
            sources: names of the training data's sources, by ``Batch.source``.
            make_weighter: builds the weighter to start with; a collective call.
            make_outer_update: None when nothing is learned.
            target_reader: reads the target set; None when nothing is learned.
        """
        self.config, self.stages, self.sample_gather, self.sources = config, stages, sample_gather, sources
        self.target_loader = target_loader
        self.consumed_target_samples = 0
        self.outer_updates = 0
        self.weighter: Weighter | None = None
        self.outer: OuterUpdate | None = None
        self._make_weighter, self._make_outer_update = make_weighter, make_outer_update

    def starts(self, iteration: int) -> bool:
        """Whether the weighter has to come to life before this iteration."""
        return self.weighter is None and self.stages.weighs(iteration)

    def start(self) -> None:
        """Bring the weighter to life; a collective call."""
        self.adopt(self._make_weighter())

    def adopt(self, weighter: Weighter) -> None:
        """Use ``weighter`` from now on."""
        self.weighter = weighter
        self.outer = self._make_outer_update(weighter) if self._make_outer_update is not None else None

    def describe(self) -> str:
        """The weighter in a few words."""
        assert self.weighter is not None
        kind = type(self.weighter.model).__name__
        return f"{kind} of {self.weighter.num_parameters} parameters, {self.config.dwm_mode}"

    def weigh(self, iteration: int, batch: Batch) -> SampleWeights | None:
        """The weights of this iteration's samples; None while they are uniform by schedule."""
        if not self.stages.weighs(iteration):
            return None
        assert self.weighter is not None
        own_scores = self.weighter.score(batch.tokens[self.sample_gather.rank_slice])
        scores = self.sample_gather.gather_from_ranks(own_scores).cpu()
        relative = weights_from_scores(scores, self.config.dwm_temperature)
        return SampleWeights(scores, relative, self.sample_gather.select_replica(relative).to(batch.tokens.device))

    def updates(self, iteration: int) -> bool:
        """Whether an outer update follows this iteration's step."""
        return self.outer is not None and self.stages.updates(iteration)

    def update(
        self,
        iteration: int,
        batch: Batch,
        weights: SampleWeights,
        losses: SampleLosses | None,
        before: ParameterCopy,
    ) -> dict[str, Any]:
        """Make the outer update that follows the step on ``batch``; returns its record, or that it was skipped.

        Args:
            losses: that step's, on the last pipeline stage.
        """
        assert self.outer is not None and self.target_loader is not None
        target = self.target_loader.next_batch()
        self.consumed_target_samples += self.target_loader.partition.global_samples
        result = self.outer.run(batch, target, before)
        if result is None:
            return self._skipped(iteration)
        self.outer_updates += 1
        index = self.sample_gather.gather_from_replicas(batch.index).tolist()
        source = self.sample_gather.gather_from_replicas(batch.source).tolist()
        shared = self.outer.lm_gradients.engine.broadcast_losses(losses, len(batch)).mean
        loss = self.sample_gather.gather_from_replicas(shared).tolist()
        return self._record(iteration, index, source, loss, weights, result)

    def warnings(self, weights: SampleWeights) -> list[HealthWarning]:
        """What is wrong with these weights."""
        floor = self.config.dwm_min_effective_sample_size
        return check_weights(weights.relative, floor) + check_scores(weights.scores, self.outer_updates)

    def by_source(self, batch: Batch, weights: SampleWeights | None) -> dict[str, dict[str, float]]:
        """Of each data source in the batch: its share of the gradient, Σ w over its samples, and its mean weight."""
        source = self.sample_gather.gather_from_replicas(batch.source).cpu()
        relative = weights.relative if weights is not None else torch.ones(len(source), dtype=torch.float64)
        present = {name: source == number for number, name in enumerate(self.sources) if bool((source == number).any())}
        figures = {"share_by_source": {name: float(relative[own].sum()) / len(source) for name, own in present.items()}}
        if weights is not None:
            figures["weight_by_source"] = {name: float(relative[own].mean()) for name, own in present.items()}
        return figures

    def _skipped(self, iteration: int) -> dict[str, Any]:
        assert self.outer is not None
        if self.sample_gather.parallel_state.is_first_rank:
            scale = float(self.outer.lm_gradients.optimizer.get_loss_scale())
            say(f" > outer update of iteration {iteration} skipped: an alignment is not finite at loss scale {scale:g}")
        return {"kind": "skipped_outer_update", "iteration": iteration, "stage": self.stages.stage(iteration)}

    def _record(
        self,
        iteration: int,
        index: list[int],
        source: list[int],
        loss: list[float],
        weights: SampleWeights,
        result: OuterResult,
    ) -> dict[str, Any]:
        return {
            "kind": "outer_update",
            "iteration": iteration,
            "stage": self.stages.stage(iteration),
            "target_loss": result.target_loss,
            **asdict(WeightStatistics.of(weights.relative)),
            "objective_before": result.objective_before,
            "objective_after": result.objective_after,
            "weighter_grad_norm": result.weighter_grad_norm,
            "weighter_hash": result.weighter_hash,
            "samples": {
                "index": index,
                "source": [self.sources[number] for number in source],
                "score": weights.scores.tolist(),
                "weight": weights.relative.tolist(),
                "alignment": result.alignments.tolist(),
                "loss": loss,
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, whatever its layout; a collective call.

        Replayed samples are gathered in global order.
        """
        replay = []
        for aligned in self.outer.replay if self.outer is not None else ():
            tokens = self.sample_gather.gather_from_ranks(aligned.tokens).to("cpu", torch.int32)
            replay.append({"tokens": tokens, "alignments": aligned.alignments})
        weighter = self.weighter
        return {
            "consumed_target_samples": self.consumed_target_samples,
            "outer_updates": self.outer_updates,
            "weighter_config": weighter.model.config.to_json_string(use_diff=False) if weighter else None,
            "weighter": weighter.model.state_dict() if weighter else None,
            "weighter_optimizer": weighter.optimizer.state_dict() if weighter else None,
            "replay": replay,
        }

    def load_state_dict(self, state: dict[str, Any], make_weighter: Callable[[str], Weighter]) -> None:
        """Take up where :meth:`state_dict` stopped.

        Args:
            make_weighter: builds a weighter from a Hugging Face configuration in JSON.
        """
        self.consumed_target_samples = state["consumed_target_samples"]
        self.outer_updates = state["outer_updates"]
        if state["weighter"] is None:
            return
        weighter = make_weighter(state["weighter_config"])
        weighter.model.load_state_dict(state["weighter"])
        weighter.optimizer.load_state_dict(state["weighter_optimizer"])
        self.adopt(weighter)
        if self.outer is not None:
            device = torch.device(torch.cuda.current_device())
            for entry in state["replay"]:
                own = self.sample_gather.select_rank(entry["tokens"]).to(device, torch.int64)
                self.outer.replay.append(AlignedBatch(own, entry["alignments"]))
