"""How often the host waits for a number of the device, counted where both are a CPU."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

_READS = {"item", "tolist", "__float__", "__int__", "__bool__", "__index__", "numpy", "__array__", "nonzero", "equal"}
_CODE = ("megatron_dwm", "megatron")
_OF_HOST = ("tensor_parallel/random.py", "data/loader.py")
"""Files that read the state of the CPU's random stream, and samples before they are put on the device."""


class HostReads(TorchFunctionMode):
    """Counts, while open, the reads of tensors that would be on a GPU, by the line of code that reads.

    Tensors are the host's if they were made without a device, were copied to "cpu", or follow from such tensors alone;
    all others are the device's. A copy that is not waited for (``non_blocking``) is no read, and reading it later is
    none either. A copy to the device for which the host waits counts as a read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self._of_host: Any = WeakTensorKeyDictionary()

    @property
    def total(self) -> int:
        """Number of all reads."""
        return self.places.total()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, and count it if it reads."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        inputs = list(_tensors([args, kwargs]))
        is_of_host = all(tensor in self._of_host for tensor in inputs) if inputs else "device" not in kwargs
        is_copied = name == "cpu" or (name == "to" and "cpu" in (*args[1:], kwargs.get("device")))
        to_device = name == "to" and any(isinstance(arg, torch.device) for arg in (*args[1:], kwargs.get("device")))
        into_device = name == "copy_" and args[0] not in self._of_host and args[1] in self._of_host
        is_sent = (to_device and is_of_host) or into_device
        indexes_by_mask = name == "__getitem__" and any(t.dtype == torch.bool for t in _tensors([args[1:]]))
        crosses = is_sent or (is_copied and not is_of_host)
        is_read = not is_of_host and (name in _READS or indexes_by_mask)
        if is_read or (crosses and not kwargs.get("non_blocking")):
            place = _place()
            self.places[place] += not place.startswith(_OF_HOST)
        result = func(*args, **kwargs)
        if is_copied or to_device:
            result = result.detach()  # an object of its own, where nothing was to be copied
        if is_copied or (is_of_host and not to_device):
            for tensor in _tensors([result]):
                self._of_host[tensor] = True
        return result


def _tensors(values: Any) -> Any:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _place() -> str:
    """Return the innermost line of the package's or megatron-core's code."""
    for frame in reversed(traceback.extract_stack()):
        parts = Path(frame.filename).parts
        if any(name in parts for name in _CODE):
            return f"{'/'.join(parts[-2:])}:{frame.lineno} {frame.line}"
    return "elsewhere"
