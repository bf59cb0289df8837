"""Loading of several validation sets one after the other, and of sets that are evaluated completely.

One loader reads them all. A set that is read completely has each of its samples once in an evaluation, for any batch
size and number of replicas: its last batch is padded with samples of which no token's loss counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Dataset

from megatron_dwm.data.sampler import BatchPartition

PADDING = -1
"""Index of a sample without a token whose loss counts."""


class ValidationSets(Dataset[dict[str, Any]]):
    """The samples of all sets, one set after the other."""

    def __init__(self, datasets: Sequence[Any]) -> None:
        self.datasets, self.lengths = datasets, [len(dataset) for dataset in datasets]
        self._samples: ConcatDataset[dict[str, Any]] = ConcatDataset(datasets)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = self._samples[max(index, 0)]
        if index != PADDING:
            return item
        return {**item, "loss_mask": torch.zeros_like(item["loss_mask"])}


class SetsSampler:
    """A sampler that reads some batches of each set, set after set, once for every evaluation.

    Sets that are read completely start from the beginning in every evaluation; others continue where the last one
    stopped.
    """

    def __init__(
        self, lengths: Sequence[int], batches: Sequence[int], consumed: int | None, partition: BatchPartition
    ) -> None:
        """
        Args:
            lengths: samples of each set.
            batches: batches that an evaluation reads of each set.
            consumed: samples of each set that were read before; None if sets are read completely.
        """
        self.lengths, self.batches, self.consumed, self.partition = lengths, batches, consumed, partition

    def __iter__(self) -> Iterator[list[int]]:
        size = self.partition.global_samples
        starts = [0, *itertools.accumulate(self.lengths)]
        for evaluation in itertools.count():
            for start, length, batches in zip(starts, self.lengths, self.batches, strict=False):
                first = 0 if self.consumed is None else self.consumed + evaluation * batches * size
                for batch in range(batches):
                    places = range(first + batch * size, first + (batch + 1) * size)
                    step = [start + place if place < length else PADDING for place in places]
                    yield self.partition.replica_indices(step)
