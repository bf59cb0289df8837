"""Reading pickles that others may have written, without running code that is in them.

A pickle names the functions that rebuild its objects, and ordinary unpickling calls them. What a
checkpoint needs is known, so anything else is refused: in ``common.pt`` and single objects by torch's
``weights_only`` loading, in ``.metadata``, which torch reads with plain pickle, by the list below.
"""

from __future__ import annotations

import contextlib
import enum
import pickle
import re
import signal
import struct
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_DTYPES = """
    bfloat16 bool complex128 complex64 float16 float32 float64 float8_e4m3fn float8_e5m2 int16 int32 int64 int8 uint8
"""
ALLOWED: frozenset[tuple[str, str]] = frozenset(
    {
        *(("torch", name) for name in _DTYPES.split()),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        (_METADATA, "BytesStorageMetadata"),
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "Metadata"),
        (_METADATA, "MetadataIndex"),
        (_METADATA, "StorageMeta"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "TensorStorageMetadata"),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        (_PLANNER, "BytesIOWriteData"),
        (_PLANNER, "SavePlan"),
        (_PLANNER, "TensorWriteData"),
        (_PLANNER, "WriteItem"),
        (_PLANNER, "WriteItemType"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
        ("collections", "OrderedDict"),
    }
)
"""Module and name of all that a ``.metadata`` file may name: plain data classes and enumerations."""

_GETATTR = ("builtins.getattr", "__builtin__.getattr")
"""The names of ``getattr`` in pickles, which depend on the protocol."""

DAMAGE = (
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)
"""What unpickling raises when bytes are missing or wrong."""

COMMON_KEY = "common_state/shard_0_1"
"""Key under which megatron-core from 0.17 on stores the common state."""


class UnreadableFileError(Exception):
    """A file that cannot be read; the message names it and the reason."""


def enum_member(kind: Any, name: Any) -> enum.Enum:
    """Return a member of an enumeration; replaces ``getattr`` when a pickle is loaded.

    Python 3.11.0 to 3.11.3 write a member as ``getattr(class, name)``; other versions write it as ``class(value)``.

    Raises:
        UnpicklingError: ``kind`` is no enumeration, or has no such member.
    """
    if not (isinstance(kind, enum.EnumMeta) and name in kind.__members__):
        raise pickle.UnpicklingError("it names builtins.getattr, which no checkpoint needs except for enumerations")
    member: enum.Enum = kind.__members__[name]
    return member


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _GETATTR:
            return enum_member
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Any:
    """Return the ``Metadata`` in a checkpoint's ``.metadata`` file.

    Raises:
        UnreadableFileError: the file is missing or damaged, or names something that is not allowed.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except DAMAGE as error:
        raise UnreadableFileError(f"{path.name} cannot be read ({short_reason(error)})") from None
    if not isinstance(metadata, Metadata):
        raise UnreadableFileError(
            f"{path.name} holds a {type(metadata).__name__} in place of a checkpoint's description"
        )
    return metadata


def read_torch_file(path: Path) -> Any:
    """Return the content of a ``torch.save`` file: tensors, plain values, and the classes of Megatron-LM's arguments.

    Raises:
        UnreadableFileError: the file is missing or damaged, or names something that is not allowed.
    """
    try:
        return load_restricted(BytesIO(path.read_bytes()))
    except DAMAGE as error:
        raise UnreadableFileError(f"{path.name} cannot be read ({short_reason(error)})") from None


def map_torch_file(path: Path) -> Any:
    """Return the content of a ``torch.save`` file, memory-mapped: tensors are read from the file when they are used.

    Raises:
        UnreadableFileError: the file is missing or damaged, or names something that is not allowed.
    """
    try:
        return _torch_load(path, mmap=True)
    except DAMAGE as error:
        raise UnreadableFileError(f"{path.name} cannot be read ({short_reason(error)})") from None


def load_restricted(content: BytesIO) -> Any:
    """Load what ``torch.save`` wrote, if it contains only allowed classes."""
    import megatron.core  # noqa: F401  registers the classes of Megatron-LM's arguments with torch

    return _torch_load(content)


def _torch_load(source: Path | BytesIO, **options: Any) -> Any:
    import torch

    # Megatron-LM's arguments hold a signal. Python 3.10 writes it by its global name, later versions as Signals(15).
    signals: list[tuple[Any, str]] = [(member, f"signal.{name}") for name, member in signal.Signals.__members__.items()]
    with torch.serialization.safe_globals([*((enum_member, name) for name in _GETATTR), *signals]):
        return torch.load(source, map_location="cpu", weights_only=True, **options)


def short_reason(error: BaseException) -> str:
    """Return the type of an error of unpickling, and the most informative line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # torch first advises to load the file without the restriction; what it refused comes after that.
    refusals = [line for line in lines[1:] if re.search("unsupported|not allowed|GLOBAL", line, re.IGNORECASE)]
    return f"{type(error).__name__}: {(refusals or lines)[0]}"[:200].rstrip(": ")


def read_common_state(folder: Path) -> Any:
    """Return the common state of a checkpoint: its arguments and counters.

    They are in ``common.pt``; megatron-core from 0.17 on stores them among the tensors.

    Raises:
        UnreadableFileError: they are missing or damaged, or name something that is not allowed.
    """
    path, described = folder / "common.pt", folder / ".metadata"
    if path.exists() or not described.exists():
        return read_torch_file(path)
    metadata = read_metadata(described)
    places = [place for index, place in (metadata.storage_data or {}).items() if index.fqn == COMMON_KEY]
    if len(places) != 1:
        return read_torch_file(path)  # raises the error that it is missing
    (place,) = places
    try:
        if Path(place.relative_path).name != place.relative_path:
            raise ValueError(f"{place.relative_path} is not in the folder")
        with (folder / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            (common,) = load_restricted(BytesIO(file.read(place.length)))
    except DAMAGE as error:
        raise UnreadableFileError(f"{COMMON_KEY} cannot be read ({short_reason(error)})") from None
    return common


@contextlib.contextmanager
def restricted_checkpoint_loading() -> Iterator[None]:
    """Make megatron-core and torch load checkpoints with the restrictions of this module, inside the context."""
    from megatron.core.dist_checkpointing.strategies import torch as strategies
    from torch.distributed.checkpoint._traverse import set_element

    # ``async_strategy``, which megatron-core passes from 0.17 on, only selects a class of reader.
    def reader(checkpoint_dir: str | Path, cache_metadata: bool = False, async_strategy: str = "mcore") -> Any:
        return restricted_reader(Path(checkpoint_dir))

    def load_bytes(planner: Any, read_item: Any, value: BytesIO) -> None:
        key, loaded = read_item.dest_index.fqn, load_restricted(value)
        if planner.flatten_state_dict:
            set_element(planner.original_state_dict, planner.mappings[key], loaded)
        else:  # from 0.17 on
            planner.state_dict[key] = loaded

    replaced = strategies._get_filesystem_reader
    strategies._get_filesystem_reader = reader
    strategies.MCoreLoadPlanner.load_bytes = load_bytes
    try:
        yield
    finally:
        strategies._get_filesystem_reader = replaced
        del strategies.MCoreLoadPlanner.load_bytes


def restricted_reader(folder: Path) -> Any:
    """Return torch's reader of a checkpoint's folder, with :func:`read_metadata` instead of its own."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            metadata = read_metadata(folder / ".metadata")
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(folder)
