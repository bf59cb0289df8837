"""The alignments of a global batch with the target set.

Shape legend: N samples of the global batch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_dwm.model.parameter_copy import ParameterCopy
from megatron_dwm.weighting.bilevel.alignment import Direction
from megatron_dwm.weighting.health import require_alignments
from megatron_dwm.weighting.policy import StepOutcome
from megatron_dwm.weighting.sample_gather import SampleGather


@dataclass(frozen=True)
class Alignments:
    """Results of one pass over the target samples and one over the batch."""

    values: torch.Tensor
    """[N], float64, global order, on the CPU and the same on every rank."""
    target_loss: float
    """Mean target loss at the model's parameters."""


class Samples(Protocol):
    """Samples of one step, in the form that the passes take."""

    @property
    def tokens(self) -> torch.Tensor:
        """The tokens that the weighter reads [n, s], int64."""

    def __len__(self) -> int:
        """Return n."""


class GradientPasses(Protocol):
    """The passes over a language model in an outer update; they do not change its parameters or gradients."""

    @property
    def loss_scale(self) -> float:
        """The factor of the loss in training."""

    @property
    def check_for_nan(self) -> bool:
        """Whether alignments that are not finite end the run."""

    def deterministic(self) -> AbstractContextManager[None]:
        """Return a context without dropout, in which no random stream advances."""

    def gradient(self, batch: Any) -> tuple[float, Direction]:
        """Return the mean loss of target samples and its gradient v, the same on every replica."""

    def align(self, batch: Any, direction: Direction) -> torch.Tensor:
        """Return the alignments of this replica's samples [n], float64."""

    def discard(self, direction: Direction) -> None:
        """Free v and its buffers."""


class AlignmentPass:
    """Aligns batches with batches of the target set, without changing the language model."""

    def __init__(self, lm_gradients: GradientPasses, sample_gather: SampleGather) -> None:
        self.lm_gradients, self.sample_gather = lm_gradients, sample_gather

    def run(self, batch: Samples, target: Samples, old_parameters: ParameterCopy | None = None) -> Alignments | None:
        """Align ``batch`` with ``target``; a collective call of all ranks that empties the gradient buffers.

        Args:
            batch: this replica's samples.
            target: this replica's target samples.
            old_parameters: the parameters θ, at which the samples' gradients are taken; the target's is taken at θ',
                which the model holds. The copy holds θ' afterwards. If not given, both are taken at the model's
                parameters.

        Returns:
            None, on every rank, if an alignment is not finite and the schedule lets such numbers pass, as fp16 training
            with its loss scale must.

        Raises:
            FloatingPointError: an alignment is not finite and the schedule checks for that.
            UserError: all alignments are zero.
        """
        with self.lm_gradients.deterministic():
            target_loss, direction = self.lm_gradients.gradient(target)
            if old_parameters is not None:
                old_parameters.swap()
            alignments = self.sample_gather.gather_from_replicas(self.lm_gradients.align(batch, direction)).cpu()
            self.lm_gradients.discard(direction)
            if old_parameters is not None:  # the copy holds θ' now, and is not needed any more
                old_parameters.restore()
        if not bool(alignments.isfinite().all()):
            if self.lm_gradients.check_for_nan:
                raise FloatingPointError("an alignment is not finite; lower --lr, or look at the data of this step")
            return None
        require_alignments(alignments)
        return Alignments(alignments, target_loss)


def reason_unchanged(outcome: StepOutcome) -> str | None:
    """Return why a step changed no parameter, and so provides no information on its weights; None if it did."""
    if outcome.skipped:
        return "the gradient of its step overflowed"
    return "the learning rate of its step is 0" if outcome.learning_rate == 0 else None
