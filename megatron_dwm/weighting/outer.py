"""One outer update: how the weighter learns (docs/method.md, section 3).

Shape legend: N samples of the global batch, n of this replica, c of this rank's share, s sequence length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.data.batch import Batch
from megatron_dwm.model.schedule import PipelineSchedule
from megatron_dwm.runtime.distributed import Layout
from megatron_dwm.runtime.parameters import ParameterCopy
from megatron_dwm.weighting.alignment import Direction, global_norm, products_with, shift, sum_over_model
from megatron_dwm.weighting.exchange import SampleExchange
from megatron_dwm.weighting.health import require_alignments
from megatron_dwm.weighting.preconditioner import precondition
from megatron_dwm.weighting.weighter import Weighter
from megatron_dwm.weighting.weights import objective, objective_score_gradient

FINITE_DIFFERENCE_DISTANCE = 1e-2  # how far θ is moved along v, in norm


@dataclass(frozen=True)
class AlignedBatch:
    """Samples with their alignments, kept for a few more weighter steps."""

    tokens: torch.Tensor
    """This rank's share of the samples [c, s]."""
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
        self,
        config: WeightingConfig,
        schedule: PipelineSchedule,
        optimizer: Any,
        weighter: Weighter,
        exchange: SampleExchange,
        layout: Layout,
        micro_batch_size: int,
    ) -> None:
        self.config, self.schedule, self.optimizer, self.weighter = config, schedule, optimizer, weighter
        self.exchange, self.layout, self.micro_batch_size = exchange, layout, micro_batch_size
        self.replay: deque[AlignedBatch] = deque(maxlen=config.dwm_replay)

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
        with self.schedule.deterministic():
            target_loss, direction = self.target_gradient(target)
            before.swap()
            alignments = self.exchange.gather_replicas(self.align(batch, direction)).cpu()
            before.swap()
        del direction  # as large as the gradient, and the weighter's steps need room
        if not bool(alignments.isfinite().all()):
            if self.schedule.check_for_nan:
                raise FloatingPointError("an alignment is not finite; lower --lr, or look at the data of this step")
            return None

        require_alignments(alignments)

        tokens = batch.tokens[self.exchange.own_share]
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

    def target_gradient(self, target: Batch) -> tuple[float, Direction]:
        """Mean target loss and v, its gradient, at the present parameters; preconditioned if so configured."""
        return self.gradient(target)

    def gradient(self, batch: Batch, sample_scale: torch.Tensor | None = None) -> tuple[float, Direction]:
        """Mean loss of ``batch``, and the gradient of its loss as weighted by ``sample_scale`` [n], preconditioned."""
        self._zero_gradients()
        losses = self.schedule.run(batch, self.micro_batch_size, sample_scale=sample_scale, force_all_reduce=True)
        scale = 1.0 / float(self.optimizer.get_loss_scale())
        direction = {
            param: param.main_grad.detach().to(torch.promote_types(param.dtype, torch.float32)) * scale
            for param in self._params()
        }
        self._zero_gradients()
        if self.config.dwm_preconditioner == "adam":
            precondition(direction, self.optimizer, self.layout)
        return self._mean_over_replicas(losses, len(batch)), direction

    def align(self, batch: Batch, direction: Direction) -> torch.Tensor:
        """a_i = ⟨v, ∇ l_i⟩ of this replica's samples [n], float64, at the present parameters."""
        if self.config.dwm_alignment == "finite-difference":
            return self._align_by_differences(batch, direction)
        self._zero_gradients()
        chunks = self.schedule.chunks
        with (
            self.schedule.unsynchronised(),
            products_with(direction, chunks, len(batch), self.layout) as products,
        ):
            self.schedule.run(batch, 1)
        self._zero_gradients()
        # The schedule divides each microbatch's loss by their number, and fp16 training scales it.
        products *= len(batch) / float(self.optimizer.get_loss_scale())
        return sum_over_model(products, self.layout)

    def _align_by_differences(self, batch: Batch, direction: Direction) -> torch.Tensor:
        norm = global_norm(direction, self.layout)
        if norm == 0:
            return torch.zeros(len(batch), dtype=torch.float64, device=batch.tokens.device)
        epsilon = FINITE_DIFFERENCE_DISTANCE / norm
        here = ParameterCopy(self.schedule.chunks)
        sides = []
        for distance in (epsilon, -epsilon):
            shift(direction, distance)
            with torch.no_grad():
                losses = self.schedule.run(batch, self.micro_batch_size, forward_only=True)
            sides.append(self.schedule.share_losses(losses, len(batch)).mean.double())
            here.restore()
        return (sides[0] - sides[1]) / (2 * epsilon)

    def _weighter_step(self, aligned: AlignedBatch) -> float:
        def score_gradient(own_scores: torch.Tensor) -> torch.Tensor:
            scores = self.exchange.gather_shares(own_scores).cpu()
            gradient = objective_score_gradient(aligned.alignments, scores, *self._objective_settings)
            return self.exchange.share_part(gradient)

        return self.weighter.step(aligned.tokens, score_gradient)

    def _objective(self, aligned: AlignedBatch) -> float:
        scores = self.exchange.gather_shares(self.weighter.score(aligned.tokens)).cpu()
        return objective(aligned.alignments, scores, *self._objective_settings)

    @property
    def _objective_settings(self) -> tuple[float, float, float]:
        config = self.config
        return config.dwm_temperature, config.dwm_kl_weight, config.dwm_clip_alignment

    def _mean_over_replicas(self, losses: Any, num_samples: int) -> float:
        mean = self.schedule.share_losses(losses, num_samples).mean.double().mean()
        dist.all_reduce(mean, group=self.layout.dp_group)
        return float(mean) / self.layout.dp_size

    def _params(self) -> Sequence[Any]:
        return [p for chunk in self.schedule.chunks for p in chunk.parameters() if p.requires_grad]

    def _zero_gradients(self) -> None:
        for chunk in self.schedule.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
