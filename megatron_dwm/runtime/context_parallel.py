"""The part of a sequence that a context-parallel rank holds, as in Megatron-LM.

A sequence is split into 2C chunks for C ranks, and rank r holds chunks r and 2C - 1 - r. Under causal attention an
early chunk and a late one together have the same cost on every rank.

Shape legend: s sequence length.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def chunk_numbers(rank: int, size: int) -> tuple[int, int]:
    """Return which of the sequence's ``2 * size`` chunks rank ``rank`` holds, in their order."""
    return rank, 2 * size - 1 - rank


def slice_sequence(tensor: torch.Tensor, rank: int, size: int, dim: int = 1) -> torch.Tensor:
    """Return the rank's part [.., s / size, ..] of a tensor [.., s, ..] whose dimension ``dim`` is the sequence's."""
    if size == 1:
        return tensor
    chunks = tensor.chunk(2 * size, dim=dim)
    return torch.cat([chunks[number] for number in chunk_numbers(rank, size)], dim=dim)


def gather_sequence(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the whole sequence [s, ..] of all ranks' parts [s / size, ..]; a collective call of the group.

    In the backward pass every rank receives the sum of all ranks' gradients of its part.
    """
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    size = group.size()
    by_rank = gather_from_sequence_parallel_region(tensor, group=group).chunk(2 * size)
    held = [number for rank in range(size) for number in chunk_numbers(rank, size)]
    return torch.cat([by_rank[held.index(number)] for number in range(2 * size)])
