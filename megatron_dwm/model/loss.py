"""The loss of the language model: the reduction of token losses, with or without sample weights.

Shape legend: n samples of this replica, b samples of a microbatch, s sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_dwm.errors import UserError
from megatron_dwm.runtime.process_groups import ParallelState


class LossFunction(Protocol):
    """Reduction of one microbatch's token losses; megatron-core divides it by the number of unmasked tokens."""

    def __call__(self, token_losses: torch.Tensor, loss_mask: torch.Tensor, samples: slice) -> torch.Tensor:
        """Return a scalar to differentiate.

        Args:
            token_losses: [b, s], float32 (float64 for float64 models).
            loss_mask: 1.0 where a token's loss counts [b, s].
            samples: position of the microbatch among the batch's samples.
        """


def plain_loss(token_losses: torch.Tensor, loss_mask: torch.Tensor, samples: slice) -> torch.Tensor:
    """Return Megatron-LM's Σ mask · loss."""
    return torch.sum(token_losses.reshape(-1) * loss_mask.reshape(-1))


def weighted_loss(sample_weights: torch.Tensor | None) -> LossFunction:
    """Return Megatron-LM's loss with each sample's token losses multiplied by its weight: Σ weight · mask · loss.

    Weights change neither the mask nor the number of tokens that the sum is divided by. Weights of 1.0 leave every bit
    of the loss unchanged.

    Args:
        sample_weights: weights of the batch's samples [n]; None for the plain loss.
    """
    if sample_weights is None:
        return plain_loss

    def loss(token_losses: torch.Tensor, loss_mask: torch.Tensor, samples: slice) -> torch.Tensor:
        return plain_loss(token_losses * sample_weights[samples, None].to(token_losses), loss_mask, samples)

    return loss


@dataclass(frozen=True)
class SampleLosses:
    """Token losses of samples, summed without weights."""

    total: torch.Tensor
    """Σ of the unmasked tokens' losses [n], float32."""
    tokens: torch.Tensor
    """Number of unmasked tokens [n], float32."""

    @classmethod
    def of(cls, token_losses: torch.Tensor, loss_mask: torch.Tensor) -> SampleLosses:
        """Sum token losses [b, s] where ``loss_mask`` [b, s] is 1."""
        return cls((token_losses * loss_mask).sum(dim=1).detach(), loss_mask.sum(dim=1))

    @property
    def mean(self) -> torch.Tensor:
        """Mean token loss l_i of each sample [n]; 0 for a sample without an unmasked token."""
        return self.total / self.tokens.clamp(min=1)

    @property
    def sums(self) -> torch.Tensor:
        """Sum of the losses and number of tokens of all samples [2], for :func:`mean_over_tokens`."""
        return torch.stack([self.total.sum(), self.tokens.sum()])


def mean_over_tokens(sums: torch.Tensor, parallel_state: ParallelState) -> float:
    """Return the mean token loss over all replicas; a collective call of the data-parallel group.

    Args:
        sums: this replica's :attr:`SampleLosses.sums` [2], of one batch or added up over several; overwritten.
    """
    sum_over_replicas(sums, parallel_state)
    return float(sums[0] / sums[1])


def sum_over_replicas(sums: torch.Tensor, parallel_state: ParallelState) -> None:
    """Sum :attr:`SampleLosses.sums` [2] over all replicas, in place; a collective call of the replicas."""
    dist.all_reduce(sums, group=parallel_state.dp_group)


def as_token_losses(output: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """Return the model's output as token losses [b, s], in float32, or in float64 for float64 models.

    Raises:
        UserError: ``output`` is not one loss per token, so that there are no per-sample losses.
    """
    if output.shape != loss_mask.shape:
        raise UserError(
            f"the model returns a loss of shape {list(output.shape)} where token losses {list(loss_mask.shape)} are "
            "needed: samples cannot be weighted after their losses have been reduced; leave out the flag that does so "
            "(--cross-entropy-loss-fusion, --cross-entropy-fusion-impl)"
        )
    return output if output.dtype == torch.float64 else output.float()
