"""Which samples each data-parallel rank reads: Megatron-LM's order, and no sample twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, islice
from typing import Any

import pytest

from megatron_dwm.data.sampler import BatchPartition, CyclicSampler, SequentialSampler, ShuffledSampler

MakeSampler = Callable[[int, BatchPartition], Any]  # of the samples consumed and a partition


def partitions(dp: int, micro: int = 2, microbatches: int = 2) -> list[BatchPartition]:
    return [BatchPartition(micro, microbatches, rank, dp) for rank in range(dp)]


def flat(steps: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(steps))


def sequential(total: int) -> MakeSampler:
    return lambda consumed, partition: SequentialSampler(total, consumed, partition)


def shuffled(total: int, seed: int = 5) -> MakeSampler:
    return lambda consumed, partition: ShuffledSampler(total, consumed, partition, seed)


def cyclic(total: int, is_sharded: bool) -> MakeSampler:
    return lambda consumed, partition: CyclicSampler(total, consumed, partition, is_sharded)


def test_a_step_is_dealt_out_by_microbatch_then_by_rank() -> None:
    first, second = partitions(dp=2)
    step = list(range(8))
    assert first.replica_indices(step) == [0, 1, 4, 5]
    assert second.replica_indices(step) == [2, 3, 6, 7]
    assert first.global_samples == 8 and first.replica_samples == 4


# What Megatron-LM's samplers (core_v0.16.1) yield to each rank, microbatch by microbatch.
MEGATRON_LM: dict[str, tuple[MakeSampler, int, int, list[list[list[int]]]]] = {
    # sampler, micro batch size, samples consumed, microbatches of each rank
    "sequential": (
        sequential(21),
        2,
        4,
        [[[4, 5], [8, 9], [12, 13], [16, 17]], [[6, 7], [10, 11], [14, 15], [18, 19]]],
    ),
    "cyclic, sharded": (
        cyclic(11, is_sharded=True),
        2,
        0,
        [
            [[0, 1], [3, 2], [1, 3], [2, 0], [0, 1], [3, 2], [2, 3], [1, 0]],
            [[4, 5], [7, 6], [5, 7], [6, 4], [4, 5], [7, 6], [6, 7], [5, 4]],
        ],
    ),
    "cyclic, not sharded": (
        cyclic(11, is_sharded=False),
        2,
        0,
        [
            [[4, 7], [3, 0], [5, 1], [0, 9], [8, 1], [6, 0], [6, 3], [8, 1]],
            [[1, 5], [9, 8], [6, 2], [8, 3], [7, 5], [9, 4], [0, 7], [5, 9]],
        ],
    ),
    "cyclic, sharded, three ranks": (
        cyclic(10, is_sharded=True),
        1,
        0,
        [[[2], [0], [1], [1], [2], [0]], [[5], [3], [4], [4], [5], [3]], [[8], [6], [7], [7], [8], [6]]],
    ),
}


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("case", MEGATRON_LM)
def test_order_is_that_of_megatron_lm(case: str, microbatches: int) -> None:
    sampler, micro, consumed, expected = MEGATRON_LM[case]
    for rank, expected_microbatches in enumerate(expected):
        partition = BatchPartition(micro, microbatches, rank, len(expected))
        steps = islice(sampler(consumed, partition), len(expected_microbatches) // microbatches)
        assert list(steps) == [
            flat(expected_microbatches[at : at + microbatches])
            for at in range(0, len(expected_microbatches), microbatches)
        ]


def test_reading_in_order_covers_the_data_once_and_drops_an_incomplete_step() -> None:
    parts = [list(SequentialSampler(20, 0, partition)) for partition in partitions(dp=2)]
    assert [len(part) for part in parts] == [2, 2]
    assert sorted(flat(parts[0] + parts[1])) == list(range(16))


@pytest.mark.parametrize(("total", "consumed"), [(0, 0), (7, 0), (20, 16), (20, 40)])
def test_reading_in_order_ends_where_no_whole_step_is_left(total: int, consumed: int) -> None:
    assert [list(SequentialSampler(total, consumed, partition)) for partition in partitions(dp=2)] == [[], []]


@pytest.mark.parametrize(
    "sampler",
    [
        sequential(1000),
        shuffled(37),
        shuffled(3),  # less than a step
        cyclic(40, is_sharded=True),
        cyclic(40, is_sharded=False),
        cyclic(43, is_sharded=True),  # an epoch leaves samples over
        cyclic(43, is_sharded=False),
    ],
    ids=[
        "sequential",
        "shuffled",
        "shuffled, tiny",
        "cyclic, sharded",
        "cyclic",
        "cyclic, sharded, left-over",
        "cyclic, left-over",
    ],
)
@pytest.mark.parametrize(("dp", "rank"), [(2, 0), (2, 1), (3, 0), (3, 2)])
def test_reading_resumes_where_it_stopped(sampler: MakeSampler, dp: int, rank: int) -> None:
    partition = partitions(dp)[rank]
    whole = list(islice(sampler(0, partition), 30))
    for done in (1, 7, 20):
        assert list(islice(sampler(done * partition.global_samples, partition), 30 - done)) == whole[done:]


@pytest.mark.parametrize("sampler", [sequential(64), shuffled(64), cyclic(64, is_sharded=False)])
def test_reading_resumes_with_another_number_of_ranks(sampler: MakeSampler) -> None:
    """Each step's samples stay the same ones, whichever rank reads them."""

    def steps(dp: int, microbatches: int, consumed: int, number: int) -> list[list[int]]:
        parts = [list(islice(sampler(consumed, partition), number)) for partition in partitions(dp, 2, microbatches)]
        return [sorted(flat(part[step] for part in parts)) for step in range(number)]

    whole = steps(dp=1, microbatches=4, consumed=0, number=6)
    assert steps(dp=4, microbatches=1, consumed=16, number=4) == whole[2:]


def test_a_shuffled_epoch_holds_every_sample_once_over_all_ranks() -> None:
    parts = [list(islice(ShuffledSampler(24, 0, partition, seed=1), 6)) for partition in partitions(dp=2)]
    steps = [sorted(first + second) for first, second in zip(*parts, strict=True)]
    assert sorted(flat(steps[:3])) == list(range(24)) == sorted(flat(steps[3:]))
    assert steps[:3] != steps[3:]


def test_a_shuffled_set_smaller_than_a_step_is_read_several_times_in_each() -> None:
    """5 samples, 8 a step: in 5 steps, which are 8 epochs, each sample comes 8 times, spread over the steps."""
    parts = [list(islice(ShuffledSampler(5, 0, partition, seed=1), 5)) for partition in partitions(dp=2)]
    steps = [first + second for first, second in zip(*parts, strict=True)]
    assert [len(step) for step in steps] == [8] * 5
    for sample in range(5):
        assert flat(steps).count(sample) == 8
        assert all(1 <= step.count(sample) <= 3 for step in steps)


def test_one_sample_alone_can_be_shuffled() -> None:
    (partition,) = partitions(dp=1)
    assert list(islice(ShuffledSampler(1, 0, partition, seed=1), 2)) == [[0] * 4] * 2


def test_seeds_shuffle_differently() -> None:
    (partition,) = partitions(dp=1)
    first, second = (flat(islice(ShuffledSampler(24, 0, partition, seed), 6)) for seed in (1, 100))
    assert first != second and sorted(first) == sorted(second)


@pytest.mark.parametrize("sharded", [True, False])
def test_a_cyclic_epoch_holds_every_whole_microbatch_once(sharded: bool) -> None:
    parts = [list(islice(CyclicSampler(32, 0, partition, sharded), 4)) for partition in partitions(dp=2)]
    assert sorted(flat(parts[0] + parts[1])) == list(range(32))
    if sharded:
        assert max(flat(parts[0])) < 16 <= min(flat(parts[1]))


@pytest.mark.parametrize("sharded", [True, False])
def test_no_rank_is_ahead_of_the_others_after_a_cyclic_epoch(sharded: bool) -> None:
    """Of 10 samples 3 ranks read 9 an epoch: no sample is in one epoch twice, on whichever rank."""
    parts = [
        flat(islice(CyclicSampler(10, 0, partition, sharded), 9))
        for partition in partitions(3, micro=1, microbatches=1)
    ]
    for epoch in range(3):
        read = flat(part[3 * epoch : 3 * epoch + 3] for part in parts)
        assert len(set(read)) == 9


@pytest.mark.parametrize("sharded", [True, False])
def test_cyclic_reading_goes_on_after_another_batch_size(sharded: bool) -> None:
    """6 samples are no whole number of microbatches of 2 on 2 ranks; each rank still gets whole steps."""
    for partition in partitions(dp=2):
        assert [len(step) for step in islice(CyclicSampler(32, 6, partition, sharded), 10)] == [4] * 10
