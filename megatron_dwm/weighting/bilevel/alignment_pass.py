"""The alignments of a global batch with the target set, as all that follows from them needs them.

Shape legend: N samples of the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_dwm.data.batch import Batch
from megatron_dwm.model.parameter_copy import ParameterCopy
from megatron_dwm.weighting.bilevel.health import require_alignments
from megatron_dwm.weighting.bilevel.lm_gradients import LMGradients
from megatron_dwm.weighting.policy import StepOutcome
from megatron_dwm.weighting.sample_gather import SampleGather


@dataclass(frozen=True)
class Alignments:
    """What one pass over the target and one over the batch have found."""

    values: torch.Tensor
    """[N], float64, global order, on the CPU and the same on every rank."""
    target_loss: float
    """Mean target loss at the model's parameters."""


class AlignmentPass:
    """Aligns batches with batches of the target set; the language model is afterwards what it was."""

    def __init__(self, lm_gradients: LMGradients, sample_gather: SampleGather) -> None:
        self.lm_gradients, self.sample_gather = lm_gradients, sample_gather

    def run(self, batch: Batch, target: Batch, before: ParameterCopy | None = None) -> Alignments | None:
        """Align ``batch`` with ``target``; a collective call of all ranks that empties the gradient buffers.

        Args:
            batch: this replica's samples.
            target: this replica's target samples.
            before: the parameters θ at which the samples' gradients are taken, while the model holds the θ' of the
                target's; the model's own for both if not given.

        Returns:
            None, on every rank, if an alignment is not finite and the schedule lets such numbers pass, as fp16 training
            with its loss scale must.

        Raises:
            FloatingPointError: an alignment is not finite and the schedule checks for that.
            RuntimeError: all alignments are zero.
        """
        engine = self.lm_gradients.engine
        with engine.deterministic():
            target_loss, direction = self.lm_gradients.gradient(target)
            if before is not None:
                before.swap()
            alignments = self.sample_gather.gather_from_replicas(self.lm_gradients.align(batch, direction)).cpu()
            if before is not None:
                before.swap()
        if not bool(alignments.isfinite().all()):
            if engine.check_for_nan:
                raise FloatingPointError("an alignment is not finite; lower --lr, or look at the data of this step")
            return None
        require_alignments(alignments)
        return Alignments(alignments, target_loss)


def reason_unmoved(outcome: StepOutcome) -> str | None:
    """Return why a step moved no parameter, so that it says nothing of its weights; None if it did."""
    if outcome.skipped:
        return "the gradient of its step overflowed"
    return "the learning rate of its step is 0" if outcome.learning_rate == 0 else None
