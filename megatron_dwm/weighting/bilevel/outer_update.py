"""One outer update: how the weighter learns (docs/method.md, section 3).

Shape legend: N samples of the global batch, n of this replica, c of this rank's slice, s sequence length.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.data.batch import Batch
from megatron_dwm.model.parameter_copy import ParameterCopy
from megatron_dwm.weighting.bilevel.health import require_alignments
from megatron_dwm.weighting.bilevel.lm_gradients import LMGradients
from megatron_dwm.weighting.sample_gather import SampleGather
from megatron_dwm.weighting.weighter import Weighter
from megatron_dwm.weighting.weights import objective, objective_score_gradient


@dataclass(frozen=True)
class AlignedBatch:
    """Samples with their alignments, kept for a few more weighter steps."""

    tokens: torch.Tensor
    """This rank's slice of the samples [c, s]."""
    alignments: torch.Tensor
    """Alignments of the whole batch in global order [N], float64."""


@dataclass(frozen=True)
class OuterResult:
    """What one outer update found and did."""

    alignments: torch.Tensor
    """[N], float64, global order."""
    target_loss: float
    """Mean target loss at θ'."""
    objective_before: float
    objective_after: float
    """The weighter's objective on this batch before and after its steps."""
    weighter_grad_norm: float
    """Of the last weighter step."""
    weighter_hash: str


class OuterUpdate:
    """Updates the weighter from the alignment of samples with the target."""

    def __init__(
        self, config: WeightingConfig, lm_gradients: LMGradients, weighter: Weighter, sample_gather: SampleGather
    ) -> None:
        self.config, self.lm_gradients, self.weighter, self.sample_gather = (
            config,
            lm_gradients,
            weighter,
            sample_gather,
        )
        self.replay: deque[AlignedBatch] = deque(maxlen=config.dwm_replay)

    @property
    def loss_scale(self) -> float:
        """The optimizer's present loss scale."""
        return float(self.lm_gradients.optimizer.get_loss_scale())

    def run(self, batch: Batch, target: Batch, before: ParameterCopy) -> OuterResult | None:
        """Align ``batch`` with ``target`` and move the weighter.

        The step from θ to θ' has been made; nothing but the weighter is different afterwards, and the gradient
        buffers are empty.

        Args:
            batch: this replica's samples of that step.
            target: this replica's target samples.
            before: the parameters θ; the model holds θ'.

        Returns:
            None if an alignment is not finite and the schedule lets such numbers pass, as fp16 training with its loss
            scale must: nothing has changed then, on any rank.

        Raises:
            FloatingPointError: an alignment is not finite and the schedule checks for that.
            RuntimeError: all alignments are zero, or the weighter's replicas differ.
        """
        engine = self.lm_gradients.engine
        with engine.deterministic():
            target_loss, direction = self.lm_gradients.gradient(target)
            before.swap()
            alignments = self.sample_gather.gather_from_replicas(self.lm_gradients.align(batch, direction)).cpu()
            before.swap()
        del direction  # as large as the gradient, and the weighter's steps need room
        if not bool(alignments.isfinite().all()):
            if engine.check_for_nan:
                raise FloatingPointError("an alignment is not finite; lower --lr, or look at the data of this step")
            return None

        require_alignments(alignments)

        tokens = batch.tokens[self.sample_gather.rank_slice_of(len(batch))]
        self.replay.append(AlignedBatch(tokens, alignments))
        first = self._objective(self.replay[-1])
        grad_norm = 0.0
        for step in range(self.config.dwm_weighter_steps):
            # From the newest batch backwards, and round again.
            grad_norm = self._weighter_step(self.replay[-1 - step % len(self.replay)])
        return OuterResult(
            alignments=alignments,
            target_loss=target_loss,
            objective_before=first,
            objective_after=self._objective(self.replay[-1]),
            weighter_grad_norm=grad_norm,
            weighter_hash=self.weighter.check_replicas(),
        )

    def _weighter_step(self, aligned: AlignedBatch) -> float:
        count = self.sample_gather.replica_samples_of(len(aligned.alignments))

        def score_gradient(rank_scores: torch.Tensor) -> torch.Tensor:
            scores = self.sample_gather.gather_from_ranks(rank_scores, count).cpu()
            gradient = objective_score_gradient(aligned.alignments, scores, *self._objective_settings)
            return self.sample_gather.select_rank(gradient)

        return self.weighter.step(aligned.tokens, score_gradient)

    def _objective(self, aligned: AlignedBatch) -> float:
        count = self.sample_gather.replica_samples_of(len(aligned.alignments))
        scores = self.sample_gather.gather_from_ranks(self.weighter.score(aligned.tokens), count).cpu()
        return objective(aligned.alignments, scores, *self._objective_settings)

    @property
    def _objective_settings(self) -> tuple[float, float, float]:
        config = self.config
        return config.dwm_temperature, config.dwm_kl_weight, config.dwm_clip_alignment
