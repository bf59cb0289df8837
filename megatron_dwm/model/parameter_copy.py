"""A second set of a model's parameters, to go back to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_dwm.model.protocols import ModelChunk


class ParameterCopy:
    """A copy of model chunks' parameters: taken, exchanged with the model's or put back, and dropped."""

    def __init__(self, chunks: Sequence[ModelChunk | torch.nn.Module]) -> None:
        """
        Args:
            chunks: this rank's model chunks, or any modules.
        """
        self._chunks = list(chunks)
        self._params: list[torch.nn.Parameter] = []
        self._copies: list[torch.Tensor] = []

    @classmethod
    def taken(cls, chunks: Sequence[ModelChunk | torch.nn.Module]) -> ParameterCopy:
        """Return a copy of the present parameters; a collective call as :meth:`take` is."""
        copy = cls(chunks)
        copy.take()
        return copy

    def take(self) -> None:
        """Copy the latest parameters.

        With ``--overlap-param-gather`` a rank holds only its shards of them until the next forward pass; they are
        gathered first, which makes this a collective call of the data-parallel group.
        """
        for chunk in self._chunks:
            gathering: Any = chunk if getattr(chunk, "use_forward_hook", False) else None
            if gathering is not None:
                gathering.start_param_sync(force_sync=True)
        self._params = [param for chunk in self._chunks for param in chunk.parameters()]
        self._copies = [param.detach().clone() for param in self._params]

    def swap(self) -> None:
        """Exchange the model's parameters with the copy, in place and one tensor at a time."""
        with torch.no_grad():
            for param, copy in zip(self._params, self._copies, strict=True):
                current = param.detach().clone()
                param.data.copy_(copy)
                copy.copy_(current)

    def restore(self) -> None:
        """Set the model's parameters to the copy."""
        with torch.no_grad():
            for param, copy in zip(self._params, self._copies, strict=True):
                param.data.copy_(copy)

    def drop(self) -> None:
        """Free the copy's memory."""
        self._params, self._copies = [], []
