"""Numbers on their way from the device to the host, which need not wait for them yet."""

from __future__ import annotations

import torch


class HostCopy:
    """A copy of a tensor on the host, begun when it is made and awaited when it is read.

    A host that reads a tensor of a GPU at once waits until all work before it is done, and launches nothing meanwhile.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        """
        Args:
            tensor: on any device; not to be changed.
        """
        self._copy = tensor.to("cpu", non_blocking=True)  # into pinned memory
        self._done = torch.cuda.Event() if tensor.is_cuda else None
        if self._done is not None:
            self._done.record()

    def read(self) -> torch.Tensor:
        """Return the tensor on the host, as soon as it is there."""
        if self._done is not None:
            self._done.synchronize()
        return self._copy
