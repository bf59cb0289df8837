"""A second set of a model's parameters, to go back to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class ParameterCopy:
    """A copy of the latest parameters of model chunks.

    With ``--overlap-param-gather`` a rank holds only its own shards of them until the next forward pass; they are
    gathered first, which makes this a collective call of the data-parallel group.
    """

    def __init__(self, chunks: Sequence[Any]) -> None:
        """
        Args:
            chunks: DistributedDataParallel model chunks.
        """
        for chunk in chunks:
            if chunk.use_forward_hook:
                chunk.start_param_sync(force_sync=True)
        self._params = [param for chunk in chunks for param in chunk.parameters()]
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
