"""Numbers per sample between ranks: who holds which samples of a global batch.

Shape legend: N samples of the global batch, n samples of this model replica, c samples of this rank's share.
The global order is microbatch, then data-parallel rank, then place in the microbatch: the order of the data, the same
in every layout.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_dwm.data.sampler import BatchPartition
from megatron_dwm.runtime.process_groups import ParallelState


class SampleGather:
    """Gathers values per sample over the ranks of one step's batch."""

    def __init__(self, partition: BatchPartition, parallel_state: ParallelState) -> None:
        self.partition, self.parallel_state = partition, parallel_state
        self.n = partition.replica_samples
        self.max_rank_samples = -(-self.n // parallel_state.mp_size)

    @property
    def rank_slice(self) -> slice:
        """The part of the replica's samples that this rank scores: the model-parallel ranks divide them."""
        start = min(self.parallel_state.mp_rank * self.max_rank_samples, self.n)
        return slice(start, min(start + self.max_rank_samples, self.n))

    def gather_from_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """This rank's [c, …] to the whole batch's [N, …], on every rank."""
        return self.gather_from_replicas(self._gather_model_parallel(values))

    def gather_from_replicas(self, values: torch.Tensor) -> torch.Tensor:
        """This replica's [n, …] to the whole batch's [N, …], on every rank."""
        gathered = [torch.empty_like(values) for _ in range(self.parallel_state.dp_size)]
        dist.all_gather(gathered, values.contiguous(), group=self.parallel_state.dp_group)
        by_rank = torch.stack(gathered).unflatten(1, (self.partition.num_microbatches, self.partition.micro_batch_size))
        return by_rank.transpose(0, 1).flatten(0, 2)

    def select_replica(self, values: torch.Tensor) -> torch.Tensor:
        """The whole batch's [N, …] to this replica's [n, …]."""
        grid = values.unflatten(
            0, (self.partition.num_microbatches, self.parallel_state.dp_size, self.partition.micro_batch_size)
        )
        return grid[:, self.parallel_state.dp_rank].flatten(0, 1)

    def select_rank(self, values: torch.Tensor) -> torch.Tensor:
        """The whole batch's [N, …] to this rank's share [c, …]."""
        return self.select_replica(values)[self.rank_slice]

    def _gather_model_parallel(self, values: torch.Tensor) -> torch.Tensor:
        padded = values.new_zeros(self.max_rank_samples, *values.shape[1:])
        padded[: len(values)] = values
        gathered = [torch.empty_like(padded) for _ in range(self.parallel_state.mp_size)]
        dist.all_gather(gathered, padded, group=self.parallel_state.mp_group)
        return torch.cat(gathered)[: self.n]
