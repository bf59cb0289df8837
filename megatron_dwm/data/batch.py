"""The samples of one step, the same on every rank of a model replica: complete, also under context parallelism.

Shape legend: n samples of this replica in one step, s sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_dwm.runtime.context_parallel import slice_sequence
from megatron_dwm.runtime.device import current_device
from megatron_dwm.runtime.process_groups import ParallelState


@dataclass(frozen=True)
class Batch:
    """Samples, in the order in which their microbatches are trained on."""

    tokens: torch.Tensor
    """Input tokens [n, s], int64."""
    labels: torch.Tensor
    """Next tokens [n, s], int64."""
    loss_mask: torch.Tensor
    """1.0 where a token's loss counts [n, s], float32."""
    position_ids: torch.Tensor
    """Positions [n, s], int64."""
    index: torch.Tensor
    """Index of each sample in its dataset [n], int64."""
    source: torch.Tensor
    """Index of the dataset in its blend that each sample comes from [n], int64."""

    @classmethod
    def of_sequences(cls, sequences: torch.Tensor) -> Batch:
        """Return a batch from sequences [n, s + 1] of a single dataset, in which every next token counts."""
        tokens, labels = sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens).contiguous()
        index = torch.arange(len(tokens), device=tokens.device)
        mask = torch.ones_like(tokens, dtype=torch.float32)
        return cls(tokens, labels, mask, positions, index, torch.zeros_like(index))

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, part: slice) -> Batch:
        return Batch(
            self.tokens[part],
            self.labels[part],
            self.loss_mask[part],
            self.position_ids[part],
            self.index[part],
            self.source[part],
        )

    def sequence_part(self, cp_rank: int, cp_size: int) -> Batch:
        """Return the part of each sequence [n, s / cp_size] that a context-parallel rank computes."""
        tokens, labels, loss_mask, position_ids = (
            slice_sequence(column, cp_rank, cp_size)
            for column in (self.tokens, self.labels, self.loss_mask, self.position_ids)
        )
        return Batch(tokens, labels, loss_mask, position_ids, self.index, self.source)

    def microbatches(self, size: int) -> Iterator[Batch]:
        """Yield consecutive parts of ``size`` samples."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def document_mask(self, eod: int) -> torch.Tensor:
        """Return where attention is forbidden [n, 1, s, s]: later positions and other documents.

        An end-of-document token belongs to the document it ends.
        """
        ended = (self.tokens == eod).cumsum(dim=1)
        document = torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], dim=1)
        same = document[:, :, None] == document[:, None, :]
        causal = torch.ones_like(same[0]).tril()
        return ~(same & causal)[:, None]


def broadcast_batch(
    loaded: dict[str, torch.Tensor] | None, num_samples: int, seq: int, parallel_state: ParallelState
) -> Batch:
    """Broadcast the samples that the first rank of a model replica has loaded to all its ranks.

    Args:
        loaded: collated dataset items on the replica's first rank, None elsewhere.
        num_samples: samples of this replica in one step (n).
        seq: sequence length (s).
    """
    device = current_device()
    if loaded is not None:
        columns = [loaded[key] for key in ("tokens", "labels", "loss_mask", "position_ids")]
        columns += [loaded[key][:, None] for key in ("index", "source")]
        # Memory that is not pinned is staged before such a call returns, so it may be freed without waiting.
        packed = torch.cat([column.to(torch.int64) for column in columns], dim=1).to(device, non_blocking=True)
    else:
        packed = torch.empty(num_samples, 4 * seq + 2, dtype=torch.int64, device=device)
    parallel_state.broadcast_over_replica(packed)
    tokens, labels, mask, positions, index, source = torch.split(packed, [seq, seq, seq, seq, 1, 1], dim=1)
    return Batch(
        tokens=tokens.contiguous(),
        labels=labels.contiguous(),
        loss_mask=mask.float(),
        position_ids=positions.contiguous(),
        index=index.flatten(),
        source=source.flatten(),
    )
