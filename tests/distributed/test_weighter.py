"""The weighter's replicas: equal steps, equal scores, and a check that notices when they are not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.data.sampler import BatchPartition
from megatron_dwm.runtime.process_groups import current_parallel_state
from megatron_dwm.weighting.sample_gather import SampleGather
from megatron_dwm.weighting.weighter import Weighter
from tests.distributed.harness import run_distributed
from tests.distributed.test_outer_update import classifier
from tests.small_runs import SEQ_LENGTH, VOCAB_SIZE

SAMPLES = 10
CONFIG = WeightingConfig(dwm_lr=1e-2, dwm_score_batch_size=3, dwm_target_data_path=["x"])


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [10, s] and a gradient in their scores [10]."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCAB_SIZE, (SAMPLES, SEQ_LENGTH), generator=generator)
    return tokens, torch.randn(SAMPLES, generator=generator, dtype=torch.float64)


def learn() -> tuple[torch.Tensor, str]:
    """Parameters and hash after three steps in which each rank brings its part of the samples."""
    weighter = Weighter(classifier(), CONFIG, torch.device("cpu"))
    tokens, gradient = batch()
    own = slice(dist.get_rank(), None, dist.get_world_size())
    if dist.get_world_size() == 4 and dist.get_rank() == 3:
        own = slice(0, 0)  # a rank without samples takes the same step
    elif dist.get_world_size() == 4:
        own = slice(dist.get_rank(), None, 3)
    for _ in range(3):
        weighter.step(tokens[own], lambda scores: gradient[own])
    flat = torch.cat([param.detach().flatten() for param in weighter.model.parameters()])
    return flat, weighter.check_replicas()


@pytest.mark.parametrize("world", [2, 4])
def test_steps_are_those_of_one_process_and_bitwise_alike_on_all(world: int):
    ((expected, _),) = run_distributed(learn, 1)
    results = run_distributed(learn, world)
    start = torch.cat([param.detach().flatten() for param in classifier().parameters()])
    for flat, digest in results:
        assert digest == results[0][1]
        # fp32 sums in another order; Adam divides small gradients by small ones, which magnifies that.
        assert float((flat - expected).norm()) < 1e-3 * float((expected - start).norm())


def test_a_gradient_that_is_not_finite_stops_every_rank_before_the_step():
    def diverge() -> bool:
        weighter = Weighter(classifier(), CONFIG, torch.device("cpu"))
        tokens, gradient = batch()
        if dist.get_rank() == 1:
            gradient[0] = torch.inf
        before = weighter.hash()
        with pytest.raises(FloatingPointError, match="the weighter's gradient"):
            weighter.step(tokens, lambda scores: gradient)
        return weighter.hash() == before

    assert run_distributed(diverge, 2) == [True, True]


def test_the_gradient_is_clipped_to_the_norm_of_the_flag_and_not_at_all_with_0():
    def norms() -> list[tuple[float, float]]:
        """The norm that a step returns, and that of the gradient which the optimizer is given."""
        found = []
        for limit in (0.0, 0.01):
            weighter = Weighter(classifier(), replace(CONFIG, dwm_clip_grad=limit), torch.device("cpu"))
            tokens, gradient = batch()
            norm = weighter.step(tokens, lambda scores: gradient)  # noqa: B023 - called at once
            left = [param.grad.norm() for param in weighter.model.parameters() if param.grad is not None]
            found.append((norm, float(torch.stack(left).norm())))
        return found

    ((plain, clipped),) = run_distributed(norms, 1)
    assert plain[0] == clipped[0] > 0.01
    assert plain[1] == pytest.approx(plain[0], rel=1e-5) and clipped[1] == pytest.approx(0.01, rel=1e-3)


def test_a_replica_that_differs_is_noticed_on_every_rank():
    def check() -> str:
        weighter = Weighter(classifier(), CONFIG, torch.device("cpu"))
        if dist.get_rank() == 1:
            weighter.model.score.weight.data[0, 0] += 1e-7
        with pytest.raises(RuntimeError, match="replicas differ"):
            weighter.check_replicas()
        return "noticed"

    assert run_distributed(check, 2) == ["noticed", "noticed"]


@pytest.mark.parametrize(("world", "layouts"), [(1, [(1, 1)]), (2, [(1, 1), (1, 2)]), (4, [(2, 1), (2, 2)])])
def test_values_are_gathered_in_the_datas_order_whatever_the_layout(world: int, layouts: list[tuple[int, int]]):
    cases = [(*layout, *sizes) for layout in layouts for sizes in ((1, 3), (2, 2))]

    def exchanged(tp: int, pp: int, micro: int, microbatches: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tp, pp)
        layout = current_parallel_state()
        partition = BatchPartition(micro, microbatches, layout.dp_rank, layout.dp_size)
        sample_gather = SampleGather(partition, layout)
        everything = torch.arange(partition.global_samples * 2).view(-1, 2)
        replica = sample_gather.select_replica(everything)
        expected = torch.tensor(partition.replica_indices(list(range(partition.global_samples))))
        in_order = torch.equal(replica[:, 0] // 2, expected)
        rank_part = sample_gather.select_rank(everything)
        return (
            sample_gather.gather_from_replicas(replica),
            sample_gather.gather_from_ranks(rank_part, partition.replica_samples),
            in_order,
        )

    for results in run_distributed(lambda: [exchanged(*case) for case in cases], world):
        for case, (replicas, from_ranks, in_order) in zip(cases, results, strict=True):
            expected = torch.arange(len(replicas) * 2).view(-1, 2)
            assert in_order and torch.equal(replicas, expected) and torch.equal(from_ranks, expected), case
