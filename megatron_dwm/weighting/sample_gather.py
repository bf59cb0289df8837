"""Which rank holds which samples of a global batch, and the gathering of per-sample values.

Shape legend: N samples of the global batch, n samples of this model replica, c samples of this rank's slice,
s sequence length.
The global order is microbatch, then data-parallel rank, then position in the microbatch. It is the order of the data,
the same in every layout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_dwm.data.sampler import BatchPartition
from megatron_dwm.runtime.process_groups import ParallelState


class SampleGather:
    """Gathers per-sample values over the ranks, and selects a rank's or replica's part of them.

    The tensor-, pipeline- and context-parallel ranks of a replica have the same n samples. Each works on a
    slice of them, so that nothing is computed twice.
    """

    def __init__(self, partition: BatchPartition, parallel_state: ParallelState) -> None:
        self.partition, self.parallel_state = partition, parallel_state

    def rank_slice(self, replica_samples: int) -> slice:
        """Return the part of the replica's samples that this rank works on, in a batch with n of them."""
        size = self._max_rank_samples(replica_samples)
        start = min(self.parallel_state.replica_rank * size, replica_samples)
        return slice(start, min(start + size, replica_samples))

    def score(self, tokens: torch.Tensor, score: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the scores of the whole batch [N] on every rank, each of which computes some; a collective call.

        Args:
            tokens: tokens of the replica's samples [n, s].
            score: returns the scores [c] of samples [c, s].
        """
        return self.gather_from_ranks(score(tokens[self.rank_slice(len(tokens))]), len(tokens))

    def gather_from_ranks(self, values: torch.Tensor, replica_samples: int) -> torch.Tensor:
        """Gather each rank's [c, …] to the whole batch's [N, …] on every rank; a collective call.

        Args:
            replica_samples: n, which does not follow from c.
        """
        return self.gather_from_replicas(self._gather_from_replica(values, replica_samples))

    def replica_samples_of(self, batch_samples: int) -> int:
        """Return n of a batch of N samples."""
        return batch_samples // self.parallel_state.dp_size

    def _max_rank_samples(self, replica_samples: int) -> int:
        return -(-replica_samples // self.parallel_state.replica_size)

    def gather_from_replicas(self, values: torch.Tensor) -> torch.Tensor:
        """Gather each replica's [n, …] to the whole batch's [N, …]; a collective call of the data-parallel group."""
        gathered = [values]
        if self.parallel_state.dp_size > 1:
            gathered = [torch.empty_like(values) for _ in range(self.parallel_state.dp_size)]
            dist.all_gather(gathered, values.contiguous(), group=self.parallel_state.dp_group)
        grid = (-1, self.partition.micro_batch_size)
        by_rank: torch.Tensor = torch.stack(gathered).unflatten(1, grid)
        return by_rank.transpose(0, 1).flatten(0, 2)

    def select_replica(self, values: torch.Tensor) -> torch.Tensor:
        """Select this replica's [n, …] of the whole batch's [N, …]."""
        partition = self.partition
        grid = (-1, self.parallel_state.dp_size, partition.micro_batch_size)
        by_rank: torch.Tensor = values.unflatten(0, grid)
        return by_rank[:, self.parallel_state.dp_rank].flatten(0, 1)

    def select_rank(self, values: torch.Tensor) -> torch.Tensor:
        """Select this rank's [c, …] of the whole batch's [N, …]."""
        replica = self.select_replica(values)
        return replica[self.rank_slice(len(replica))]

    def _gather_from_replica(self, values: torch.Tensor, replica_samples: int) -> torch.Tensor:
        padded = values.new_zeros(self._max_rank_samples(replica_samples), *values.shape[1:])
        padded[: len(values)] = values
        return self.parallel_state.gather_over_replica(padded)[:replica_samples]
