"""A running mean of the target gradient over outer updates: what few target samples leave of noise is averaged out.

Each rank keeps what its optimizer's state covers: the whole of its gradients, or, under the distributed optimizer, its
shards of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_dwm.model.buckets import buckets_of, gather_shards, shard_of
from megatron_dwm.model.protocols import ModelChunk
from megatron_dwm.runtime.device import current_device
from megatron_dwm.weighting.bilevel.alignment import Direction
from megatron_dwm.weighting.bilevel.gradient_buffers import GradientBuffers, views_by_parameter


class GradientMean:
    """m ← β m + (1 − β) g in each update, divided by the sum of its gradients' factors, so that it is a mean."""

    def __init__(self, chunks: Sequence[ModelChunk], momentum: float) -> None:
        """
        Args:
            chunks: this rank's model chunks.
            momentum: β.
        """
        self._chunks, self._momentum = chunks, momentum
        self._shards: list[torch.Tensor] = []
        """m [elements] of each bucket that this rank keeps, not yet divided; empty before the first gradient."""
        self._total = torch.zeros((), dtype=torch.float64, device=current_device())
        """Sum of the factors: 1 less the k-th power of β after k gradients."""

    def average(self, gradients: GradientBuffers) -> None:
        """Take a gradient up and put the mean in its place; a collective call of all ranks.

        A gradient that is not finite, as fp16 training may have, is forgotten, and NaN is put in its place, which
        skips the update. The host does not wait for the device.
        """
        if not self._shards:
            self._shards = [torch.zeros_like(shard) for shard in gradients.shards()]
        sums = [shard.sum() for shard in gradients.shards()]  # in float64 a CPU would copy the shards
        all_finite = torch.stack(sums).sum().isfinite().to(torch.int32)
        dist.all_reduce(all_finite, op=dist.ReduceOp.MIN)
        is_taken = all_finite.bool()
        self._total = torch.where(is_taken, self._momentum * self._total + (1 - self._momentum), self._total)
        divisor = torch.where(is_taken, self._total, torch.nan)  # without a mean there is no update
        for mean, gradient in zip(self._shards, gradients.shards(), strict=True):  # without a temporary of their size
            torch.where(is_taken, gradient, mean, out=gradient)
            mean.lerp_(gradient, 1 - self._momentum)
            gradient.copy_(mean).div_(divisor)

    def state(self) -> tuple[float, Direction] | None:
        """Return the sum of the factors, and m by parameter; None before the first gradient. Gathers shards."""
        if not self._shards:
            return None
        views: Direction = {}
        for mean, (group, bucket) in zip(self._shards, buckets_of(self._chunks), strict=True):
            whole = torch.zeros_like(bucket.grad_data, dtype=mean.dtype)
            shard_of(whole, group).copy_(mean)
            gather_shards(whole, group)
            views |= views_by_parameter(bucket, whole)
        params = [param for chunk in self._chunks for param in chunk.parameters() if param in views]
        return float(self._total), {param: views[param] for param in params}

    def load(self, total: float, mean: Mapping[torch.nn.Parameter, torch.Tensor]) -> None:
        """Go on with what :meth:`state` returned, in any layout; no communication."""
        self._total.fill_(total)
        self._shards = []
        for group, bucket in buckets_of(self._chunks):
            dtype = torch.promote_types(bucket.grad_data.dtype, torch.float32)
            whole = torch.zeros_like(bucket.grad_data, dtype=dtype)
            for param, view in views_by_parameter(bucket, whole).items():
                view.copy_(mean[param])
            self._shards.append(shard_of(whole, group).clone())
