"""Samplers: which samples each data-parallel rank reads in each step.

Megatron-LM's order: a step's microbatches follow each other, and within one microbatch the data-parallel ranks take
consecutive runs of samples. Samplers start from the number of samples consumed, so that a run resumes where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from megatron_dwm.config.batch_sizes import BatchSizes


@dataclass(frozen=True)
class BatchPartition:
    """Division of one step's samples over replicas and microbatches."""

    micro_batch_size: int
    num_microbatches: int
    dp_rank: int
    dp_size: int
    sizes: BatchSizes | None = None
    """Batch sizes, if the batch grows; this partition is then that of the largest batch."""

    def after(self, consumed: int) -> BatchPartition:
        """Return the partition of the step after ``consumed`` samples."""
        if self.sizes is None:
            return self
        return replace(self, num_microbatches=self.sizes.running(consumed) // self.sizes.unit)

    @property
    def global_samples(self) -> int:
        """Samples of one step over all replicas."""
        return self.micro_batch_size * self.num_microbatches * self.dp_size

    @property
    def replica_samples(self) -> int:
        """Samples of one step on this replica."""
        return self.micro_batch_size * self.num_microbatches

    def replica_indices(self, step: list[int]) -> list[int]:
        """Return this replica's part of one step's samples, in the order in which it trains on them."""
        stride = self.micro_batch_size * self.dp_size
        start = self.dp_rank * self.micro_batch_size
        return [
            step[microbatch * stride + start + offset]
            for microbatch in range(self.num_microbatches)
            for offset in range(self.micro_batch_size)
        ]


def build_sampler(
    kind: Literal["single", "cyclic"] | None, total: int, consumed: int, partition: BatchPartition, *, is_sharded: bool
) -> Iterable[list[int]]:
    """Build the sampler for ``--dataloader-type``.

    Args:
        total: samples of the dataset.
        consumed: samples that all replicas together have read.
        is_sharded: whether a cyclic sampler gives each replica a part of the dataset.
    """
    if kind == "cyclic":
        return CyclicSampler(total, consumed, partition, is_sharded)
    return SequentialSampler(total, consumed, partition)


class SequentialSampler:
    """A sampler that reads a dataset once, in the dataset's order, and drops an incomplete last step."""

    def __init__(self, total: int, consumed: int, partition: BatchPartition) -> None:
        self.total, self.consumed, self.partition = total, consumed, partition

    def __iter__(self) -> Iterator[list[int]]:
        start = self.consumed
        while True:
            partition = self.partition.after(start)
            end = start + partition.global_samples
            if end > self.total:
                return
            yield partition.replica_indices(list(range(start, end)))
            start = end


class ShuffledSampler:
    """A sampler that reads a dataset repeatedly; the order of an epoch is drawn from ``seed`` and the epoch.

    No sample is left out of an epoch; a step may span two epochs.
    """

    def __init__(self, total: int, consumed: int, partition: BatchPartition, seed: int) -> None:
        self.total, self.consumed, self.partition, self.seed = total, consumed, partition, seed

    def __iter__(self) -> Iterator[list[int]]:
        step: list[int] = []
        epoch, offset = divmod(self.consumed, self.total)
        while True:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            for index in torch.randperm(self.total, generator=generator).tolist()[offset:]:
                step.append(index)
                if len(step) == self.partition.global_samples:
                    yield self.partition.replica_indices(step)
                    step = []
            epoch, offset = epoch + 1, 0


class CyclicSampler:
    """Megatron-LM's ``--dataloader-type cyclic``: shuffled epochs of whole microbatches.

    With ``is_sharded``, each data-parallel rank shuffles its own contiguous part of the dataset. An epoch gives every
    rank the same number of microbatches. (In Megatron-LM one rank may draw one more from the samples left over when
    sharding is off, and then stays ahead of the others.)
    """

    def __init__(self, total: int, consumed: int, partition: BatchPartition, is_sharded: bool) -> None:
        self.total, self.consumed, self.partition, self.is_sharded = total, consumed, partition, is_sharded

    def __iter__(self) -> Iterator[list[int]]:
        step: list[int] = []
        consumed, partition = self.consumed, self.partition.after(self.consumed)
        for microbatch in self._microbatches():
            step += microbatch
            if len(step) == partition.replica_samples:
                yield step
                consumed += partition.global_samples
                step, partition = [], self.partition.after(consumed)

    def _microbatches(self) -> Iterator[list[int]]:
        size, ranks = self.partition.micro_batch_size, self.partition.dp_size
        epoch_samples = self.total - self.total % (size * ranks)
        epoch, offset = divmod(self.consumed, epoch_samples)
        offset -= offset % (size * ranks)  # a run of another batch size may have stopped within a microbatch
        while True:
            generator = torch.Generator().manual_seed(epoch)
            if self.is_sharded:
                bucket = epoch_samples // ranks
                order = torch.randperm(bucket, generator=generator)[offset // ranks :]
                samples = (order + self.partition.dp_rank * bucket).tolist()
            else:
                order = torch.randperm(self.total // size * size, generator=generator)[offset:]
                samples = order[self.partition.dp_rank :: ranks].tolist()
            for start in range(0, (epoch_samples - offset) // ranks, size):
                yield samples[start : start + size]
            epoch, offset = epoch + 1, 0
