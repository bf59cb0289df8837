"""Asynchronous copies of tensors from the device to the host."""

from __future__ import annotations

import torch


class HostCopy:
    """A copy of a tensor on the host, started when the object is created and awaited when it is read.

    A host that reads a GPU's tensor directly waits until all earlier work is done, and launches nothing meanwhile.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        """
        Args:
            tensor: on any device; must not be changed afterwards.
        """
        self._copy = tensor.to("cpu", non_blocking=True)  # into pinned memory
        self._done = torch.cuda.Event() if tensor.is_cuda else None
        if self._done is not None:
            self._done.record()

    def read(self) -> torch.Tensor:
        """Return the copy, for which the first reader waits."""
        if self._done is not None:
            self._done.synchronize()
            self._done = None
        return self._copy
