"""The harness itself: results by rank, errors of the rank that failed, workers forked after torch work."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch.overrides import _get_current_function_mode_stack

from megatron_dwm.errors import UserError
from tests.distributed.harness import WorkerTraceback, run_distributed


def _sum_of_ranks(offset: int) -> torch.Tensor:
    value = torch.tensor([float(dist.get_rank() + offset)], requires_grad=True)
    (value * 2).sum().backward()
    total = value.detach().clone()
    dist.all_reduce(total)
    assert value.grad is not None
    return torch.cat([total, value.grad])


def test_results_come_back_by_rank_and_the_parent_stays_untouched():
    modes = _get_current_function_mode_stack()
    assert run_distributed(lambda: (dist.get_rank(), os.environ["LOCAL_RANK"]), 3) == [
        (0, "0"),
        (1, "1"),
        (2, "2"),
    ]
    assert not dist.is_initialized()
    assert "RANK" not in os.environ
    assert _get_current_function_mode_stack() == modes  # a test before this one may have left some


def test_workers_compute_after_the_parent_has_run_a_backward_pass():
    weight = torch.ones(300, 300, requires_grad=True)
    (weight @ weight).sum().backward()
    for result in run_distributed(_sum_of_ranks, 2, 1):
        assert result.tolist() == [3.0, 2.0]


def test_the_first_error_is_raised_although_other_ranks_wait_in_a_collective():
    def fail_on_rank_one() -> None:
        if dist.get_rank() == 1:
            raise UserError("--flag 7: too large")
        dist.barrier()

    with pytest.raises(UserError, match="--flag 7") as caught:
        run_distributed(fail_on_rank_one, 2)
    assert isinstance(caught.value.__cause__, WorkerTraceback)
    assert "on rank 1" in str(caught.value.__cause__) and "fail_on_rank_one" in str(caught.value.__cause__)


def test_a_worker_that_dies_is_reported():
    with pytest.raises(RuntimeError, match="rank 0 died with exit code 7"):
        run_distributed(lambda: os._exit(7), 1)


def test_an_error_that_does_not_pickle_keeps_its_message():
    class LocalError(Exception):
        pass

    def fail() -> None:
        raise LocalError("reason")

    with pytest.raises(RuntimeError, match="LocalError: reason"):
        run_distributed(fail, 1)
