"""A copy of a model's parameters that can be restored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_dwm.model.buckets import buckets_of, gather_shards, shard_of
from megatron_dwm.model.protocols import ModelChunk

CHUNK_ELEMENTS = 1 << 22
"""Number of elements that are swapped at once."""


class ParameterCopy:
    """A copy of model chunks' parameters, which can be swapped with the model's, or restored.

    If the optimizer's state is sharded over data-parallel ranks, so is the copy: a rank keeps the shard that its
    optimizer updates, and restored parameters are gathered.
    """

    def __init__(self, chunks: Sequence[ModelChunk | torch.nn.Module]) -> None:
        """
        Args:
            chunks: this rank's model chunks, or any modules.
        """
        self._chunks = list(chunks)
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        """The copied tensors of the model, and their copies."""

    @classmethod
    def of(cls, chunks: Sequence[ModelChunk | torch.nn.Module]) -> ParameterCopy:
        """Return a copy of the current parameters; a collective call like :meth:`store`."""
        copy = cls(chunks)
        copy.store()
        return copy

    def store(self) -> None:
        """Copy the latest parameters.

        With ``--overlap-param-gather`` a rank holds only its shards of them until the next forward pass; they are
        gathered first, which makes this a collective call of the data-parallel group.
        """
        for chunk in self._chunks:
            gathering: Any = chunk if getattr(chunk, "use_forward_hook", False) else None
            if gathering is not None:
                gathering.start_param_sync(force_sync=True)
        sharded = {param for _, bucket in self._sharded_buckets() for param in bucket.params_list}
        held = [shard_of(bucket.param_data, group) for group, bucket in self._sharded_buckets()]
        held += [param.detach() for chunk in self._chunks for param in chunk.parameters() if param not in sharded]
        self._copies = [(parameter, parameter.clone()) for parameter in held]

    def swap(self) -> None:
        """Exchange the model's parameters with the copy, in place and part by part; collective if they are sharded."""
        with torch.no_grad():
            for parameter, copy in self._copies:
                pieces = [tensor.view(-1).split(CHUNK_ELEMENTS) for tensor in (parameter, copy)]
                for one, other in zip(*pieces, strict=True):
                    current = one.clone()
                    one.copy_(other)
                    other.copy_(current)
        self._gather()

    def restore(self) -> None:
        """Set the model's parameters to the copy; collective if they are sharded."""
        with torch.no_grad():
            for parameter, copy in self._copies:
                parameter.copy_(copy)
        self._gather()

    def release(self) -> None:
        """Free the copy's memory."""
        self._copies = []

    def _gather(self) -> None:
        for group, bucket in self._sharded_buckets():
            gather_shards(bucket.param_data, group)

    def _sharded_buckets(self) -> Iterator[tuple[dist.ProcessGroup, Any]]:
        """Yield the buckets whose parameters are sharded, with the group that holds the shards."""
        for chunk in self._chunks:
            if getattr(getattr(chunk, "ddp_config", None), "reuse_grad_buf_for_mxfp8_param_ag", False):
                continue  # its parameters are not views of the bucket
            for group, bucket in buckets_of([chunk]):
                if group is not None and bucket.param_data is not None:
                    yield group, bucket
