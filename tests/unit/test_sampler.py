"""Which samples each data-parallel rank reads: Megatron-LM's order, and no sample twice."""

from __future__ import annotations

from itertools import chain, islice

import pytest

from megatron_dwm.data.sampler import CyclicSampler, SequentialSampler, Share, ShuffledSampler


def shares(dp: int, micro: int = 2, microbatches: int = 2) -> list[Share]:
    return [Share(micro, microbatches, rank, dp) for rank in range(dp)]


def flat(steps: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(steps))


def test_a_step_is_dealt_out_by_microbatch_then_by_rank():
    first, second = shares(dp=2)
    step = list(range(8))
    assert first.own(step) == [0, 1, 4, 5]
    assert second.own(step) == [2, 3, 6, 7]
    assert first.all_samples == 8 and first.own_samples == 4


def test_reading_in_order_covers_the_data_once_and_drops_an_incomplete_step():
    parts = [list(SequentialSampler(20, 0, share)) for share in shares(dp=2)]
    assert [len(part) for part in parts] == [2, 2]
    assert sorted(flat(parts[0] + parts[1])) == list(range(16))


@pytest.mark.parametrize(
    "sampler",
    [
        lambda consumed, share: SequentialSampler(1000, consumed, share),
        lambda consumed, share: ShuffledSampler(37, consumed, share, seed=5),
        lambda consumed, share: ShuffledSampler(3, consumed, share, seed=5),  # less than a step
        lambda consumed, share: CyclicSampler(40, consumed, share, sharded=True),
        lambda consumed, share: CyclicSampler(40, consumed, share, sharded=False),
    ],
    ids=["sequential", "shuffled", "shuffled, tiny", "cyclic, sharded", "cyclic"],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_reading_resumes_where_it_stopped(sampler, rank: int):
    share = shares(dp=2)[rank]
    whole = list(islice(sampler(0, share), 30))
    for done in (1, 7, 20):
        assert list(islice(sampler(done * share.all_samples, share), 30 - done)) == whole[done:]


def test_a_shuffled_epoch_holds_every_sample_once_over_all_ranks():
    parts = [list(islice(ShuffledSampler(24, 0, share, seed=1), 6)) for share in shares(dp=2)]
    steps = [sorted(first + second) for first, second in zip(*parts, strict=True)]
    assert sorted(flat(steps[:3])) == list(range(24)) == sorted(flat(steps[3:]))
    assert steps[:3] != steps[3:]


@pytest.mark.parametrize("sharded", [True, False])
def test_a_cyclic_epoch_holds_every_whole_microbatch_once(sharded: bool):
    parts = [list(islice(CyclicSampler(32, 0, share, sharded), 4)) for share in shares(dp=2)]
    assert sorted(flat(parts[0] + parts[1])) == list(range(32))
    if sharded:
        assert max(flat(parts[0])) < 16 <= min(flat(parts[1]))
