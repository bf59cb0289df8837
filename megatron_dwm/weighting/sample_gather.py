"""Numbers per sample between ranks: who holds which samples of a global batch.

Shape legend: N samples of the global batch, n samples of this model replica, c samples of this rank's slice.
The global order is microbatch, then data-parallel rank, then place in the microbatch: the order of the data, the same
in every layout.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_dwm.data.sampler import BatchPartition
from megatron_dwm.runtime.process_groups import ParallelState


class SampleGather:
    """Gathers values per sample over the ranks of one step's batch, and selects from the whole batch's.

    The ranks of a replica (of its tensor, pipeline and context parallelism) see the same n samples. Each works on a
    slice of them, so that nothing is computed twice.
    """

    def __init__(self, partition: BatchPartition, parallel_state: ParallelState) -> None:
        self.partition, self.parallel_state = partition, parallel_state
        self.replica_samples = partition.replica_samples
        self.max_rank_samples = -(-self.replica_samples // parallel_state.replica_size)

    @property
    def rank_slice(self) -> slice:
        """The part of the replica's samples that this rank works on."""
        start = min(self.parallel_state.replica_rank * self.max_rank_samples, self.replica_samples)
        return slice(start, min(start + self.max_rank_samples, self.replica_samples))

    def gather_from_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Gather each rank's [c, …] to the whole batch's [N, …] on every rank; a collective call."""
        return self.gather_from_replicas(self._gather_from_replica(values))

    def gather_from_replicas(self, values: torch.Tensor) -> torch.Tensor:
        """Gather each replica's [n, …] to the whole batch's [N, …]; a collective call of the data-parallel group."""
        gathered = [torch.empty_like(values) for _ in range(self.parallel_state.dp_size)]
        dist.all_gather(gathered, values.contiguous(), group=self.parallel_state.dp_group)
        grid = (self.partition.num_microbatches, self.partition.micro_batch_size)
        by_rank: torch.Tensor = torch.stack(gathered).unflatten(1, grid)
        return by_rank.transpose(0, 1).flatten(0, 2)

    def select_replica(self, values: torch.Tensor) -> torch.Tensor:
        """Select this replica's [n, …] of the whole batch's [N, …]."""
        partition = self.partition
        grid = (partition.num_microbatches, self.parallel_state.dp_size, partition.micro_batch_size)
        by_rank: torch.Tensor = values.unflatten(0, grid)
        return by_rank[:, self.parallel_state.dp_rank].flatten(0, 1)

    def select_rank(self, values: torch.Tensor) -> torch.Tensor:
        """Select this rank's [c, …] of the whole batch's [N, …]."""
        return self.select_replica(values)[self.rank_slice]

    def _gather_from_replica(self, values: torch.Tensor) -> torch.Tensor:
        padded = values.new_zeros(self.max_rank_samples, *values.shape[1:])
        padded[: len(values)] = values
        return self.parallel_state.gather_over_replica(padded)[: self.replica_samples]
