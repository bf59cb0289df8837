"""Each rank of a replica scores a slice of the samples; together they are the scores of one process."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.data.sampler import BatchPartition
from megatron_dwm.runtime.process_groups import current_parallel_state
from megatron_dwm.weighting.sample_gather import SampleGather
from megatron_dwm.weighting.score_cache import ScoreCache
from megatron_dwm.weighting.weighter import Weighter
from tests.distributed.harness import run_distributed
from tests.distributed.test_outer_update import classifier
from tests.small_runs import SEQ_LENGTH, VOCAB_SIZE

CONFIG = WeightingConfig(dwm_score_batch_size=2, dwm_target_data_path=["x"])


CASES = [
    (2, 2, 1, 3, [1, 1, 1, 0]),  # a slice without samples
    (2, 2, 1, 6, [2, 2, 2, 0]),
    (4, 1, 1, 5, [2, 2, 1, 0]),
    (2, 1, 1, 3, [2, 1, 2, 1]),  # two replicas
    (1, 1, 1, 3, [3, 3, 3, 3]),
    (2, 1, 2, 6, [2, 2, 2, 0]),  # tensor-parallel ranks 0 and 1 of the first half of the sequences, then the others
    (1, 2, 2, 6, [2, 2, 2, 0]),
    (1, 1, 2, 3, [2, 1, 2, 1]),
]
"""Tensor, pipeline and context parallelism, microbatches, and the sizes of the ranks' slices."""


def scored(tp: int, pp: int, cp: int, microbatches: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Scores of the whole batch by slices and by this rank alone, and the size of its slice."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp, pp, context_parallel_size=cp)
    layout = current_parallel_state()
    sample_gather = SampleGather(BatchPartition(1, microbatches, layout.dp_rank, layout.dp_size), layout)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCAB_SIZE, (sample_gather.partition.global_samples, SEQ_LENGTH), generator=generator)
    weighter = Weighter(classifier(), CONFIG, torch.device("cpu"))
    rank_tokens = sample_gather.select_rank(tokens)
    assert torch.equal(
        rank_tokens,
        sample_gather.select_replica(tokens)[sample_gather.rank_slice(sample_gather.partition.replica_samples)],
    )
    scores = sample_gather.score(sample_gather.select_replica(tokens), weighter.score)
    return scores, weighter.score(tokens), len(rank_tokens)


def test_slices_of_any_size_add_up_to_the_scores_of_one_process():
    ranks = run_distributed(lambda: [scored(*layout) for *layout, _ in CASES], 4)
    for (*layout, sizes), results in zip(CASES, zip(*ranks, strict=True), strict=True):
        assert [size for _, _, size in results] == sizes, layout
        for by_slices, alone, _ in results:
            assert torch.equal(by_slices, results[0][0]), layout
            # Samples in other batches: fp32 sums may go in another order.
            torch.testing.assert_close(by_slices, alone, rtol=1e-5, atol=1e-6, msg=str(layout))


def scored_twice() -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Scores of a batch, of the same samples in another order and in a resumed run; how many this rank computed."""
    parallel_state.initialize_model_parallel(1, 1)
    layout = current_parallel_state()
    sample_gather = SampleGather(BatchPartition(2, 2, layout.dp_rank, layout.dp_size), layout)
    tokens = torch.randint(1, VOCAB_SIZE, (8, SEQ_LENGTH), generator=torch.Generator().manual_seed(1))
    weighter, seen = Weighter(classifier(), CONFIG, torch.device("cpu")), []

    def score(samples: torch.Tensor) -> torch.Tensor:
        seen.extend(samples.tolist())
        return weighter.score(samples)

    cache, resumed = ScoreCache(8), ScoreCache(8)
    first = cache.score(sample_gather.select_rank(tokens), 4, score, sample_gather)
    again = cache.score(sample_gather.select_rank(tokens.flip(0)), 4, score, sample_gather).flip(0)
    number = len(seen)
    resumed.load(cache.state())
    third = resumed.score(sample_gather.select_rank(tokens.roll(3, 0)), 4, score, sample_gather).roll(-3, 0)
    assert len(seen) == number and len(cache) == 8
    cache.score(sample_gather.select_rank(tokens + 1), 4, score, sample_gather)
    assert len(cache) == 8 and len(seen) == 2 * number  # the oldest made room
    return first, again, number, third


def test_a_sample_is_scored_once_whatever_rank_it_comes_to_again():
    results = run_distributed(scored_twice, 2)
    assert [number for _, _, number, _ in results] == [4, 4]
    for first, again, _, third in results:
        assert torch.equal(first, again) and torch.equal(first, third) and torch.equal(first, results[0][0])
