"""The factor of each sample's mean loss in the training loss.

Megatron-LM divides a microbatch's summed token losses by its number of unmasked tokens (or, with
``--calculate-per-token-loss``, those of the global batch by its number), so a sample counts by its tokens. The
trained loss is therefore (1/N) Σ u_i f_i l_i with the weights u and the factors f, which are 1 where samples have
equal numbers of unmasked tokens. An alignment and a source's fraction of the loss must include the same factor.

Shape legend: n samples of this replica, N of the global batch, s sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dwm.data.batch import Batch
from megatron_dwm.runtime.process_groups import ParallelState


@dataclass(frozen=True)
class LossFactors:
    """Computes the factors of a batch's samples."""

    micro_batch_size: int
    is_per_token: bool
    """Whether tokens count equally over the global batch (``--calculate-per-token-loss``), not only in a microbatch."""
    parallel_state: ParallelState

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return f of this replica's samples [n], float64; reduces over the data-parallel group if counted per token.

        The factor of a sample without an unmasked token is 0.
        """
        tokens = batch.loss_mask.sum(dim=1, dtype=torch.float64)
        if self.is_per_token:
            total = tokens.sum()
            dist.all_reduce(total, group=self.parallel_state.dp_group)
            return tokens * len(tokens) * self.parallel_state.dp_size / total.clamp(min=1)
        microbatches = tokens.view(-1, self.micro_batch_size)
        totals = microbatches.sum(dim=1, keepdim=True).clamp(min=1)  # as Megatron-LM's number of tokens
        return (microbatches * self.micro_batch_size / totals).flatten()
