"""Each rank of a replica scores its share of the samples; together they are the scores of one process."""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.data.sampler import BatchPartition
from megatron_dwm.runtime.process_groups import current_parallel_state
from megatron_dwm.weighting.sample_gather import SampleGather
from megatron_dwm.weighting.weighter import Weighter
from tests.distributed.harness import run_distributed
from tests.distributed.test_outer_update import classifier
from tests.small_runs import SEQ_LENGTH, VOCAB_SIZE

CONFIG = WeightingConfig(dwm_score_batch_size=2, dwm_target_data_path=["x"])


def scored(tp: int, pp: int, cp: int, microbatches: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Scores of the whole batch by shares and by this rank alone, and the size of its share."""
    parallel_state.initialize_model_parallel(tp, pp, context_parallel_size=cp)
    layout = current_parallel_state()
    sample_gather = SampleGather(BatchPartition(1, microbatches, layout.dp_rank, layout.dp_size), layout)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCAB_SIZE, (sample_gather.partition.global_samples, SEQ_LENGTH), generator=generator)
    weighter = Weighter(classifier(), CONFIG, torch.device("cpu"))
    own = sample_gather.select_rank(tokens)
    assert torch.equal(own, sample_gather.select_replica(tokens)[sample_gather.rank_slice])
    return sample_gather.gather_from_ranks(weighter.score(own)), weighter.score(tokens), len(own)


@pytest.mark.parametrize(
    ("tp", "pp", "cp", "microbatches", "sizes"),
    [
        (2, 2, 1, 3, [1, 1, 1, 0]),  # a share without samples
        (2, 2, 1, 6, [2, 2, 2, 0]),
        (4, 1, 1, 5, [2, 2, 1, 0]),
        (2, 1, 1, 3, [2, 1, 2, 1]),  # two replicas
        (1, 1, 1, 3, [3, 3, 3, 3]),
        (2, 1, 2, 6, [2, 2, 2, 0]),  # tensor-parallel ranks 0 and 1 of the first half of the sequences, then the others
        (1, 2, 2, 6, [2, 2, 2, 0]),
        (1, 1, 2, 3, [2, 1, 2, 1]),
    ],
)
def test_shares_of_any_size_add_up_to_the_scores_of_one_process(
    tp: int, pp: int, cp: int, microbatches: int, sizes: list[int]
):
    results = run_distributed(scored, 4, tp, pp, cp, microbatches)
    assert [size for _, _, size in results] == sizes
    for by_shares, alone, _ in results:
        assert torch.equal(by_shares, results[0][0])
        # Samples in other batches: fp32 sums may go in another order.
        torch.testing.assert_close(by_shares, alone, rtol=1e-5, atol=1e-6)
