"""The buckets of megatron-core's buffers of parameters and gradients, and the shards that data-parallel ranks hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist


def buckets_of(chunks: Iterable[Any]) -> Iterator[tuple[dist.ProcessGroup | None, Any]]:
    """Yield the buckets of model chunks, each with the group over which it is sharded; None if it is not sharded.

    Modules that are not wrapped by megatron-core have no buckets.
    """
    for chunk in chunks:
        for bucket_group in getattr(chunk, "bucket_groups", ()):
            is_sharded = chunk.ddp_config.use_distributed_optimizer
            group = bucket_group.intra_distributed_optimizer_instance_group if is_sharded else None
            for bucket in bucket_group.buckets:
                yield group, bucket


def shard_of(whole: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return this rank's shard of a bucket's tensor [elements], as a view; all of it if it is not sharded."""
    if group is None:
        return whole
    return whole.view(dist.get_world_size(group), -1)[dist.get_rank(group)]


def gather_shards(whole: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Gather a bucket's tensor from the shards of all ranks, in place; a collective call of the group."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_gather_into_tensor(whole, shard_of(whole, group), group=group)
