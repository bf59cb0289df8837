"""The batches that each rank reads of a dataset."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.data.batch import Batch
from megatron_dwm.data.loader import BatchLoader
from megatron_dwm.data.sampler import BatchPartition, SequentialSampler
from megatron_dwm.errors import UserError
from megatron_dwm.runtime.device import select_device
from megatron_dwm.runtime.process_groups import ParallelState, current_parallel_state
from tests.distributed.harness import run_distributed

SEQUENCE = 8


class Counting(torch.utils.data.Dataset[dict[str, Any]]):
    """Samples of one token, their own index, except one that is beyond any vocabulary."""

    def __init__(self, total: int, outlier: int | None = None) -> None:
        self.total, self.outlier = total, outlier

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.full((SEQUENCE,), 10**6 if index == self.outlier else index)
        return {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(SEQUENCE), "position_ids": tokens * 0}


def alone(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in a process of its own, which unlike those of ``run_distributed`` may have children."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def on_rank() -> None:
        select_device(0)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        mpu.initialize_model_parallel()
        sender.send(work())

    process = context.Process(target=on_rank)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def counting_loader(
    dataset: Counting, parallel_state: ParallelState, consumed: int = 0, workers: int = 0
) -> BatchLoader:
    """Of steps of 8 samples in order."""
    partition = BatchPartition(2, 4 // parallel_state.dp_size, parallel_state.dp_rank, parallel_state.dp_size)
    readable = dataset if parallel_state.replica_rank == 0 else None
    sampler = SequentialSampler(len(dataset) if readable is not None else 0, consumed, partition)
    return BatchLoader(readable, sampler, partition, SEQUENCE, parallel_state, 100, workers)


def samples_of(batch: Batch) -> list[int]:
    assert torch.equal(batch.tokens[:, 0], batch.index)
    return batch.index.tolist()


LAYOUTS = {
    "one": (1, ParallelConfig()),
    "data": (2, ParallelConfig()),
    "tensor": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "tensor, pipeline, data": (
        8,
        ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_of_a_replica_read_the_same_and_all_ranks_end_together(layout: str) -> None:
    """20 samples are two steps; at the third every rank has the same error, and none waits for another."""
    world_size, parallel = LAYOUTS[layout]

    def read() -> tuple[int, list[list[int]], str]:
        mpu.initialize_model_parallel(parallel.tp, parallel.pp)
        loader = counting_loader(Counting(20), current_parallel_state())
        steps = [samples_of(loader.next_batch()) for _ in range(2)]
        with pytest.raises(UserError) as raised:
            loader.next_batch()
        return current_parallel_state().dp_rank, steps, str(raised.value)

    results = run_distributed(read, world_size)
    dp_size = world_size // (parallel.tp * parallel.pp)
    expected = {
        1: [[list(range(8)), list(range(8, 16))]],
        2: [[[0, 1, 4, 5], [8, 9, 12, 13]], [[2, 3, 6, 7], [10, 11, 14, 15]]],
    }[dp_size]
    assert sorted({dp_rank for dp_rank, _, _ in results}) == list(range(dp_size))
    for dp_rank, steps, message in results:
        assert steps == expected[dp_rank]
        assert message == "the data is exhausted; lower --train-iters or --eval-iters, or give more data"


def test_a_token_outside_the_vocabulary_is_an_error_on_every_rank_of_the_replica() -> None:
    def read() -> str:
        mpu.initialize_model_parallel(2)
        loader = counting_loader(Counting(20, outlier=11), current_parallel_state())
        loader.next_batch()
        with pytest.raises(UserError) as raised:
            loader.next_batch()
        return str(raised.value)

    for message in run_distributed(read, 2):
        assert message.startswith("token 1000000 in the data is outside the tokenizer's vocabulary of 100;")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_where_one_stopped(workers: int) -> None:
    def read() -> tuple[list[list[int]], list[list[int]]]:
        parallel_state, dataset = current_parallel_state(), Counting(40)
        whole, resumed = (counting_loader(dataset, parallel_state, consumed, workers) for consumed in (0, 16))
        return [samples_of(whole.next_batch()) for _ in range(5)], [samples_of(resumed.next_batch()) for _ in range(3)]

    whole, resumed = alone(read)
    assert resumed == whole[2:]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_leaves_the_random_numbers_of_the_run_alone(workers: int) -> None:
    def read() -> bool:
        before = torch.get_rng_state()
        loader = counting_loader(Counting(40), current_parallel_state(), workers=workers)
        loader.next_batch()
        return torch.equal(before, torch.get_rng_state())

    assert alone(read) is True
