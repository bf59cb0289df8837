"""A gradient that stays in megatron-core's buffers: v, the direction that samples are aligned with.

A backward pass leaves it there as training has it: whole on every rank, or, under the distributed optimizer, on each
rank the shard that the rank's optimizer updates. The optimizer's state is sharded alike, so each rank scales its shard,
and the shards are gathered once, bucket by bucket.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_dwm.model.protocols import ModelChunk
from megatron_dwm.weighting.bilevel.alignment import Direction


@dataclass(frozen=True)
class _Bucket:
    """A part of the gradient whose shards are gathered together."""

    whole: torch.Tensor
    """[elements], float32 or wider."""
    group: dist.ProcessGroup | None
    """The ranks that hold shards of it; None if each rank has it whole."""

    @property
    def own(self) -> torch.Tensor:
        """The part that this rank holds."""
        if self.group is None:
            return self.whole
        return self.whole.view(dist.get_world_size(self.group), -1)[dist.get_rank(self.group)]


class GradientBuffers:
    """The gradient that the last backward pass has left in the chunks' buffers."""

    def __init__(self, chunks: Sequence[ModelChunk]) -> None:
        """
        Args:
            chunks: this rank's model chunks. Buffers narrower than float32 are copied to float32.
        """
        self._buckets: list[_Bucket] = []
        views: Direction = {}
        for group, bucket in _buckets(chunks):
            whole = bucket.grad_data.to(torch.promote_types(bucket.grad_data.dtype, torch.float32))
            self._buckets.append(_Bucket(whole, group))
            for param in bucket.params_list:
                start = param.main_grad.storage_offset() - bucket.grad_data.storage_offset()
                views[param] = whole[start : start + param.numel()].view(param.shape)
        params = [param for chunk in chunks for param in chunk.parameters() if param in views]
        self.direction: Direction = {param: views[param] for param in params}
        """By parameter, in place: each rank's part is right, the whole is after :meth:`gather_shards`."""

    def scale(self, factor: torch.Tensor) -> None:
        """Multiply the rank's part by a number."""
        for bucket in self._buckets:
            bucket.own.mul_(factor)

    def gather_shards(self) -> None:
        """Complete the gradient on every rank; a collective call of the ranks that hold shards."""
        for bucket in self._buckets:
            if bucket.group is not None and dist.get_world_size(bucket.group) > 1:
                dist.all_gather_into_tensor(bucket.whole, bucket.own, group=bucket.group)


def _buckets(chunks: Sequence[ModelChunk]) -> Iterator[tuple[dist.ProcessGroup | None, Any]]:
    """Yield all buckets, with the group over which their gradients and parameters are sharded, if they are."""
    for chunk in chunks:
        for bucket_group in chunk.bucket_groups:
            is_sharded = chunk.ddp_config.use_distributed_optimizer
            group = bucket_group.intra_distributed_optimizer_instance_group if is_sharded else None
            for bucket in bucket_group.buckets:
                yield group, bucket
