"""The samples of validation sets that are read by themselves."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from megatron_dwm.data.sampler import BatchPartition
from megatron_dwm.data.validation_sets import PADDING, SetsSampler, ValidationSets


def items(count: int, first: int) -> list[dict[str, torch.Tensor]]:
    return [{"tokens": torch.tensor([first + number]), "loss_mask": torch.ones(1)} for number in range(count)]


def test_padding_is_a_sample_of_which_nothing_counts():
    sets = ValidationSets([items(3, first=10), items(2, first=20)])
    assert sets.lengths == [3, 2] and len(sets) == 5
    assert [int(sets[index]["tokens"]) for index in range(5)] == [10, 11, 12, 20, 21]
    assert float(sets[PADDING]["loss_mask"]) == 0 and sets[PADDING]["tokens"].shape == sets[0]["tokens"].shape
    assert float(sets[0]["loss_mask"]) == 1


@pytest.mark.parametrize("replicas", [1, 2])
def test_sets_that_are_read_whole_have_each_sample_once_an_evaluation(replicas: int):
    partitions = [BatchPartition(2, 2 // replicas, rank, replicas) for rank in range(replicas)]  # batches of 4
    for partition in partitions:
        assert partition.global_samples == 4
    steps = [list(islice(SetsSampler([5, 4, 1], [2, 1, 1], None, partition), 8)) for partition in partitions]
    seen = [sorted(index for rank in steps for index in rank[number]) for number in range(8)]
    first = [[0, 1, 2, 3], [PADDING] * 3 + [4], [5, 6, 7, 8], [PADDING] * 3 + [9]]
    assert seen == [*first, *first]


def test_other_sets_are_read_on_from_what_was_consumed():
    sampler = SetsSampler([20, 20], [2, 2], 4, BatchPartition(2, 1, 0, 1))
    first, second = [list(islice(sampler, 8))[part] for part in (slice(0, 4), slice(4, 8))]
    assert first == [[4, 5], [6, 7], [24, 25], [26, 27]]
    assert second == [[8, 9], [10, 11], [28, 29], [30, 31]]
