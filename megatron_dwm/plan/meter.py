"""Counts the bytes that code allocates and sends while it runs.

Everything that torch computes and communicates passes through its dispatcher. A dispatch mode sees the storage of
each result and the tensors of each collective call, whether tensors are real or fake.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SMALL = 256
"""Payloads of at most this many bytes are not counted: single numbers that ranks agree on, such as norms."""

_OPERATIONS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "_allgather_base": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
    "broadcast": "broadcast",
    "send": "send",
}
"""Names of collectives here, by the beginning of torch's names. What is received is not counted."""


@dataclass
class Traffic:
    """Bytes that one rank sends."""

    payloads: dict[str, float] = field(default_factory=dict)
    """Bytes of the whole tensors that collective calls carried, by operation."""
    sent: dict[str, float] = field(default_factory=dict)
    """Bytes that a rank sends for them, by operation, where ranks pass pieces on in a ring."""

    def add(self, operation: str, payload: float, ranks: int) -> None:
        """Add a call of ``ranks`` ranks whose whole tensor has ``payload`` bytes."""
        if ranks < 2 and operation != "send":
            return
        passes = {"all-reduce": 2 * (ranks - 1) / ranks, "send": 1.0, "broadcast": 1.0}
        sent = payload * passes.get(operation, (ranks - 1) / ranks)
        self.payloads[operation] = self.payloads.get(operation, 0) + payload
        self.sent[operation] = self.sent.get(operation, 0) + sent

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(_summed(self.payloads, other.payloads), _summed(self.sent, other.sent))

    def times(self, factor: float) -> Traffic:
        """Return the traffic of several repetitions."""
        scaled = [{name: factor * value for name, value in part.items()} for part in (self.payloads, self.sent)]
        return Traffic(*scaled)

    @property
    def total(self) -> float:
        """All bytes that are sent."""
        return sum(self.sent.values())


class Meter(TorchDispatchMode):
    """Inside the context, counts the bytes of new storages as long as they live, and the traffic."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocated = 0
        """Bytes of the storages that were made since the start and still live."""
        self.peak = 0
        """The maximum of ``allocated``."""
        self.traffic = Traffic()
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):  # storages that are not known yet were made before the start
            self._note(tensor, is_new=False)
        result = function(*args, **(kwargs or {}))
        if function.namespace == "c10d":
            self._count_call(function, args)
        for tensor in tree_leaves(result):
            self._note(tensor, is_new=True)
        return result

    def _note(self, value: Any, *, is_new: bool) -> None:
        if not isinstance(value, torch.Tensor):
            return
        storage = value.untyped_storage()
        key = storage_key(storage)
        if key in self._sizes:
            return
        size = self._sizes[key] = storage.nbytes() if is_new else 0
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.allocated -= self._sizes.pop(key, 0)

    def _count_call(self, function: Any, args: tuple[Any, ...]) -> None:
        name = function.name().removeprefix("c10d::")
        stem = name.split("_into_tensor")[0].split("_tensor")[0].split("_coalesced")[0].rstrip("_")
        operation = _OPERATIONS.get(stem)
        if operation is None:
            return
        groups = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
        ranks = dist.ProcessGroup.unbox(groups[0]).size()
        # The whole tensor is a gather's output or a reduction's input; the output is the first argument.
        whole = args[1] if operation == "reduce-scatter" else args[0]
        payload = sum(tensor.numel() * tensor.element_size() for tensor in tree_leaves(whole))
        if payload > SMALL:
            self.traffic.add(operation, payload, ranks)


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return a number that no other storage has while this one lives; those of fake tensors have no address."""
    return int(StorageWeakRef(storage).cdata)


def _summed(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}
