"""The batches of one dataset, step by step, on every rank of a model replica."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_dwm.data.batch import Batch, broadcast_batch
from megatron_dwm.data.sampler import BatchPartition
from megatron_dwm.errors import UserError
from megatron_dwm.runtime.process_groups import ParallelState
from megatron_dwm.runtime.stop_signals import STOP_SIGNALS

_NO_TOKEN = -1  # fills the batch that reports the end of the data


class NumberedDataset(Dataset[dict[str, Any]]):
    """A dataset whose items also hold their index, and the number of their dataset in the blend."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = dict(self.dataset[index])
        source = int(item.pop("dataset_id", 0))
        keys = ("tokens", "labels", "loss_mask", "position_ids")
        return {**{key: item[key] for key in keys}, "index": index, "source": source}


def _ignore_stop_signals(worker: int) -> None:
    """Make worker processes ignore the signals that ask the run to save and stop.

    A scheduler sends them to every process of a job step. The run shuts the workers down when it has saved.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class BatchLoader:
    """Loader of one :class:`Batch` per step on every rank of a replica; only the replica's first rank reads files."""

    def __init__(
        self,
        dataset: Any,
        sampler: Iterable[list[int]],
        partition: BatchPartition,
        seq: int,
        parallel_state: ParallelState,
        vocab_size: int,
        num_workers: int,
        consumed: int = 0,
    ) -> None:
        """Start reading.

        Args:
            dataset: the samples; None on ranks that do not read.
            sampler: for each step the indices of this replica's samples.
            partition: how many samples a step has.
            seq: tokens of one sample.
            vocab_size: tokens from this id on are refused.
            num_workers: processes that read ahead; with 0 this process reads.
            consumed: samples that were read before, which batches that grow depend on.
        """
        self.consumed = consumed
        self.partition, self.seq, self.parallel_state, self.vocab_size = partition, seq, parallel_state, vocab_size
        self.steps: Iterator[dict[str, torch.Tensor]] | None = None
        if dataset is not None:
            loader = DataLoader(
                NumberedDataset(dataset),
                batch_sampler=sampler,
                num_workers=num_workers,
                pin_memory=torch.cuda.is_available(),
                persistent_workers=num_workers > 0,
                worker_init_fn=_ignore_stop_signals,
                # A loader draws a seed when it starts; without a generator it would draw from the run's stream.
                generator=torch.Generator(),
            )
            self.steps = iter(loader)

    def next_batch(self) -> Batch:
        """Return the next step's samples; a collective call of the replica's ranks.

        Raises:
            UserError: a token outside the vocabulary, or no data left.
        """
        loaded, partition = None, self.partition.after(self.consumed)
        if self.parallel_state.replica_rank == 0:
            loaded = next(self.steps, None) if self.steps is not None else None
            if loaded is None:
                loaded = self._end_of_data(partition.replica_samples)
        batch = broadcast_batch(loaded, partition.replica_samples, self.seq, self.parallel_state)
        self.consumed += partition.global_samples
        tokens = batch.tokens
        if loaded is not None and self.parallel_state.replica_size == 1:
            tokens = loaded["tokens"]  # on the host, which then need not wait for the device
        least, largest = torch.stack(tokens.aminmax()).tolist()
        if least == _NO_TOKEN:
            raise UserError("the data is exhausted; lower --train-iters or --eval-iters, or give more data")
        if largest >= self.vocab_size:
            raise UserError(
                f"token {largest} in the data is outside the tokenizer's vocabulary of {self.vocab_size}; use the "
                "tokenizer that the data was preprocessed with (--tokenizer-model, --vocab-size)"
            )
        return batch

    def close(self) -> None:
        """Stop reading, and wait for the worker processes to end."""
        self.steps = None  # the last reference: the loader shuts its workers down

    def _end_of_data(self, n: int) -> dict[str, torch.Tensor]:
        """Return the items that a replica's first rank sends instead of samples when there is no further step.

        The samplers of all replicas end at the same step, so every rank of the run stops there.
        """
        columns = torch.full((n, self.seq), _NO_TOKEN)
        matrices = dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids"), columns)
        return {**matrices, "index": torch.zeros(n), "source": torch.zeros(n)}
