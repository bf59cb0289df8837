"""A running mean of the target gradient over outer updates, which reduces the noise of few target samples.

Each rank keeps the part that its optimizer's state covers: all of its gradients, or its shards of them with the
distributed optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_dwm.model.buckets import buckets_of, gather_shards, shard_of
from megatron_dwm.model.protocols import ModelChunk
from megatron_dwm.runtime.device import current_device
from megatron_dwm.weighting.bilevel.alignment import Direction
from megatron_dwm.weighting.bilevel.gradient_buffers import GradientBuffers, views_by_parameter


class GradientAverage(Protocol):
    """Averaging of target gradients over updates, or none."""

    def average(self, gradients: GradientBuffers) -> None:
        """Replace the gradient in the buffers; a collective call of all ranks."""

    def state(self) -> tuple[float, Direction] | None:
        """Return the state for a checkpoint; None if there is none."""

    def load(self, total: float, mean: Mapping[torch.nn.Parameter, torch.Tensor]) -> None:
        """Continue from a value of :meth:`state`."""


class NoMean:
    """No mean: each target gradient is used as it is."""

    def average(self, gradients: GradientBuffers) -> None:
        """Do nothing."""

    def state(self) -> None:
        """Return None: there is no state."""

    def load(self, total: float, mean: Mapping[torch.nn.Parameter, torch.Tensor]) -> None:
        """Do nothing: the run that saved the mean had other flags."""


NO_MEAN = NoMean()


class GradientMean:
    """The mean m / t of gradients g: each update sets m ← β m + (1 − β) g and t ← β t + (1 − β)."""

    def __init__(self, chunks: Sequence[ModelChunk], momentum: float) -> None:
        """
        Args:
            chunks: this rank's model chunks.
            momentum: β.
        """
        self._chunks, self._momentum = chunks, momentum
        self._shards: list[torch.Tensor] = []
        """This rank's part of m [elements], for each bucket; empty before the first gradient."""
        self._total = torch.zeros((), dtype=torch.float64, device=current_device())
        """t, which is 1 - β^k after k gradients."""

    def average(self, gradients: GradientBuffers) -> None:
        """Add a gradient to the mean and replace it by the mean; a collective call of all ranks.

        A gradient that is not finite, which happens in fp16 training, is not added but replaced by NaN, so that the
        update is skipped. The host does not wait for the device.
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
            torch.div(mean, divisor, out=gradient)

    def state(self) -> tuple[float, Direction] | None:
        """Return t, and m by parameter; None before the first gradient. Gathers the shards."""
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
        """Continue from a value of :meth:`state`, which may come from another layout; no communication."""
        self._total.fill_(total)
        self._shards = []
        for group, bucket in buckets_of(self._chunks):
            dtype = torch.promote_types(bucket.grad_data.dtype, torch.float32)
            whole = torch.zeros_like(bucket.grad_data, dtype=dtype)
            for param, view in views_by_parameter(bucket, whole).items():
                view.copy_(mean[param])
            self._shards.append(shard_of(whole, group).clone())
