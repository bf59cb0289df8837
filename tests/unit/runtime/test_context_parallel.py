"""Which part of a sequence each context-parallel rank holds."""

from __future__ import annotations

import pytest
import torch

from megatron_dwm.data.batch import Batch
from megatron_dwm.runtime.context_parallel import chunk_numbers, slice_sequence


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_hold_every_token_once_and_as_much_of_causal_attention(size: int):
    positions = torch.arange(12)[None]
    parts = [slice_sequence(positions, rank, size) for rank in range(size)]
    assert sorted(torch.cat(parts, dim=1).flatten().tolist()) == list(range(12))
    assert {part.shape for part in parts} == {(1, 12 // size)}
    assert {sum(chunk_numbers(rank, size)) for rank in range(size)} == {2 * size - 1}


def test_a_rank_holds_an_early_chunk_and_a_late_one():
    assert slice_sequence(torch.arange(12), 1, 3, dim=0).tolist() == [2, 3, 8, 9]


def test_a_batch_is_divided_along_its_sequences():
    positions = torch.arange(8).expand(2, -1)
    batch = Batch(
        positions, positions + 1, (positions % 2).float(), positions, torch.tensor([5, 6]), torch.tensor([0, 1])
    )
    part = batch.sequence_part(1, 2)
    assert part.tokens.tolist() == part.position_ids.tolist() == [[2, 3, 4, 5]] * 2
    assert part.labels.tolist() == [[3, 4, 5, 6]] * 2 and part.loss_mask.tolist() == [[0, 1, 0, 1]] * 2
    assert part.index is batch.index and part.source is batch.source
