"""Collective calls of all processes, which also work in a single process without torch.distributed."""

from __future__ import annotations

import torch
import torch.distributed as dist


def all_reduce_over_world(tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    """Reduce ``tensor`` in place over all processes."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=op)


def is_lost_connection(error: BaseException) -> bool:
    """Return whether a collective failed because another rank is gone or silent; gloo raises a plain RuntimeError."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def world_rank() -> int:
    """Return the rank of this process among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1
