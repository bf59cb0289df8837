"""A gradient that is kept in megatron-core's buffers: v, the direction that samples are aligned with.

A backward pass leaves it there as in training: complete on every rank, or, with the distributed optimizer, on each
rank the shard that the rank's optimizer updates. The optimizer's state is sharded the same way, so each rank scales its
shard, and the shards are gathered once, bucket by bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_dwm.model.buckets import buckets_of, gather_shards, shard_of
from megatron_dwm.model.protocols import ModelChunk
from megatron_dwm.weighting.bilevel.alignment import Direction


class GradientBuffers:
    """The gradient that the last backward pass left in the chunks' buffers."""

    def __init__(self, chunks: Sequence[ModelChunk]) -> None:
        """
        Args:
            chunks: this rank's model chunks. Buffers of lower precision than float32 are copied to float32.
        """
        self._buckets: list[tuple[torch.Tensor, dist.ProcessGroup | None]] = []
        """Gradients [elements] of a bucket, float32 or wider, and the group that holds shards of them."""
        views: Direction = {}
        for group, bucket in buckets_of(chunks):
            whole = bucket.grad_data.to(torch.promote_types(bucket.grad_data.dtype, torch.float32))
            self._buckets.append((whole, group))
            views |= views_by_parameter(bucket, whole)
        params = [param for chunk in chunks for param in chunk.parameters() if param in views]
        self.direction: Direction = {param: views[param] for param in params}
        """The direction as views by parameter: each rank's shard is valid; all of it after :meth:`gather_shards`."""

    def shards(self) -> list[torch.Tensor]:
        """Return the rank's part of each bucket [elements], in place."""
        return [shard_of(whole, group) for whole, group in self._buckets]

    def scale(self, factor: torch.Tensor) -> None:
        """Multiply the rank's part by a number."""
        for shard in self.shards():
            shard.mul_(factor)

    def gather_shards(self) -> None:
        """Complete the gradient on every rank; a collective call of the ranks that hold shards."""
        for whole, group in self._buckets:
            gather_shards(whole, group)


def views_by_parameter(bucket: Any, whole: torch.Tensor) -> Direction:
    """Return views of a tensor as long as a bucket's gradients [elements]: each parameter's part in its shape."""
    views: Direction = {}
    for param in bucket.params_list:
        start = param.main_grad.storage_offset() - bucket.grad_data.storage_offset()
        views[param] = whole[start : start + param.numel()].view(param.shape)
    return views
