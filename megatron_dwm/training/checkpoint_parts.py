"""Tensors of a checkpoint's ``.distcp`` files, read and written part by part: models larger than memory.

torch's planners define which part of which tensor is where; its readers and writers request one part at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_dwm.safe_unpickling import restricted_reader


def read_part(folder: Path, metadata: Any, key: str, first: Sequence[int], target: torch.Tensor) -> None:
    """Read the part of a tensor that begins at ``first`` and has the shape of ``target`` into ``target``.

    Args:
        folder: the checkpoint's folder.
        metadata: torch's description of the checkpoint.
    """
    planner = _PartPlanner(key, metadata.state_dict_metadata[key], first)
    planner.set_up_planner({key: target}, metadata, is_coordinator=True)
    reader = restricted_reader(folder)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = planner.finish_plan(planner.create_local_plan())
    reader.read_data(reader.prepare_local_plan(plan), planner).wait()


class _PartPlanner(DefaultLoadPlanner):
    """Reads a part of one tensor."""

    def __init__(self, key: str, description: Any, first: Sequence[int]) -> None:
        """
        Args:
            key: the tensor's key.
            description: the tensor's entry in the checkpoint's metadata.
            first: first index of the part in each dimension.
        """
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.key, self.description, self.first = key, description, torch.Size(first)

    def create_local_plan(self) -> LoadPlan:
        """Plan to read the stored parts that the wanted one overlaps."""
        wanted = ChunkStorageMetadata(self.first, self.state_dict[self.key].size())
        return LoadPlan(create_read_items_for_chunk_list(self.key, self.description, [wanted]))

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """Return the tensor that is read into."""
        tensor: torch.Tensor = self.state_dict[index.fqn]
        return tensor


@dataclass(frozen=True)
class TensorPart:
    """A part of a tensor, computed when it is written."""

    first: tuple[int, ...]
    size: tuple[int, ...]
    make: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class TensorOfParts:
    """A tensor to write in parts."""

    size: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[TensorPart, ...]


def write_parts(
    folder: Path,
    tensors: Mapping[str, TensorOfParts],
    objects: Mapping[str, Any],
    on_write: Callable[[int], object] = lambda size: None,
) -> None:
    """Write tensors and objects as a checkpoint's ``.distcp`` files, with one part in memory at a time.

    Args:
        folder: the checkpoint's folder.
        on_write: called with the size in bytes of each part.
    """
    from torch.distributed.checkpoint.api import CheckpointException  # a BaseException: nothing else catches it
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(dict(objects), checkpoint_id=str(folder), planner=_PartsPlanner(tensors, on_write), no_dist=True)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise (causes[0] if causes else error) from None


class _PartsPlanner(DefaultSavePlanner):
    """Writes tensors of parts, and the objects of a state dict."""

    def __init__(self, tensors: Mapping[str, TensorOfParts], on_write: Callable[[int], object]) -> None:
        super().__init__()
        self.tensors, self.on_write = tensors, on_write

    def create_local_plan(self) -> SavePlan:
        """Plan to write each part as a shard."""
        self.mappings.update({key: (key,) for key in self.tensors})
        plan = super().create_local_plan()
        shards = [_write_item(key, tensor, part) for key, tensor in self.tensors.items() for part in tensor.parts]
        self.plan = dataclasses.replace(plan, items=[*plan.items, *shards], planner_data=self.mappings)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Compute the part that is written next."""
        if index.fqn not in self.tensors:
            return super().lookup_object(index)
        (part,) = (part for part in self.tensors[index.fqn].parts if part.first == tuple(index.offset or ()))
        tensor = part.make().contiguous()
        if tensor.shape != part.size:
            raise ValueError(f"a part of {index.fqn} has the shape {list(tensor.shape)} and not {list(part.size)}")
        self.on_write(tensor.numel() * tensor.element_size())
        return tensor


def _write_item(key: str, tensor: TensorOfParts, part: TensorPart) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(key, torch.Size(part.first)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=torch.Size(part.first), sizes=torch.Size(part.size)),
            properties=TensorProperties(dtype=tensor.dtype),
            size=torch.Size(tensor.size),
        ),
    )
