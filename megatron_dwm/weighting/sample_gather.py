"""Numbers per sample between ranks: who holds which samples of a global batch.

Shape legend: N samples of the global batch, n samples of this model replica, c samples of this rank's share.
The global order is microbatch, then data-parallel rank, then place in the microbatch: the order of the data, the same
in every layout.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_dwm.data.sampler import Share
from megatron_dwm.runtime.process_groups import Layout


class SampleExchange:
    """Gathers values per sample over the ranks of one step's batch."""

    def __init__(self, share: Share, layout: Layout) -> None:
        self.share, self.layout = share, layout
        self.n = share.own_samples
        self.largest_share = -(-self.n // layout.mp_size)

    @property
    def own_share(self) -> slice:
        """The part of the replica's samples that this rank scores: the model-parallel ranks divide them."""
        start = min(self.layout.mp_rank * self.largest_share, self.n)
        return slice(start, min(start + self.largest_share, self.n))

    def gather_shares(self, values: torch.Tensor) -> torch.Tensor:
        """This rank's [c, …] to the whole batch's [N, …], on every rank."""
        return self.gather_replicas(self._gather_model_parallel(values))

    def gather_replicas(self, values: torch.Tensor) -> torch.Tensor:
        """This replica's [n, …] to the whole batch's [N, …], on every rank."""
        gathered = [torch.empty_like(values) for _ in range(self.layout.dp_size)]
        dist.all_gather(gathered, values.contiguous(), group=self.layout.dp_group)
        by_rank = torch.stack(gathered).unflatten(1, (self.share.num_microbatches, self.share.micro_batch_size))
        return by_rank.transpose(0, 1).flatten(0, 2)

    def replica_part(self, values: torch.Tensor) -> torch.Tensor:
        """The whole batch's [N, …] to this replica's [n, …]."""
        grid = values.unflatten(0, (self.share.num_microbatches, self.layout.dp_size, self.share.micro_batch_size))
        return grid[:, self.layout.dp_rank].flatten(0, 1)

    def share_part(self, values: torch.Tensor) -> torch.Tensor:
        """The whole batch's [N, …] to this rank's share [c, …]."""
        return self.replica_part(values)[self.own_share]

    def _gather_model_parallel(self, values: torch.Tensor) -> torch.Tensor:
        padded = values.new_zeros(self.largest_share, *values.shape[1:])
        padded[: len(values)] = values
        gathered = [torch.empty_like(padded) for _ in range(self.layout.mp_size)]
        dist.all_gather(gathered, padded, group=self.layout.mp_group)
        return torch.cat(gathered)[: self.n]
