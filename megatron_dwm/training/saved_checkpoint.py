"""A checkpoint on disk, opened and verified before anything is loaded from it."""

from __future__ import annotations

import contextlib
import json
import logging
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from megatron_dwm.checksums import Checksum, find_damage
from megatron_dwm.errors import UserError, shortened
from megatron_dwm.runtime.collectives import is_lost_connection
from megatron_dwm.safe_unpickling import (
    DAMAGE,
    UnreadableFileError,
    load_restricted,
    read_common_state,
    read_metadata,
    read_torch_file,
    restricted_reader,
    short_reason,
)
from megatron_dwm.special_files import find_special_file
from megatron_dwm.training.checkpoint_checksums import part_of_rank, read_checksums
from megatron_dwm.training.checkpoint_folders import (
    DWM_STATE,
    NON_PERSISTENT,
    RELEASE,
    has_torch_format,
    iteration_of,
    older_checkpoints,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedCheckpoint:
    """The parts of a checkpoint that are read before its tensors."""

    folder: Path
    common: Mapping[str, Any]
    """The state that is not sharded: arguments, counters, schedule."""
    metadata: Any
    """torch's description of the tensors and objects in the ``.distcp`` files."""

    @property
    def arguments(self) -> Namespace:
        """The arguments that it was saved with; empty if it has none."""
        arguments = self.common.get("args")
        return arguments if isinstance(arguments, Namespace) else Namespace()

    @property
    def is_release(self) -> bool:
        """Whether it is a model to start from, and not a run to continue."""
        return self.folder.name == RELEASE

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of each tensor, by key."""
        described = self.metadata.state_dict_metadata
        return {key: tuple(entry.size) for key, entry in described.items() if hasattr(entry, "size")}

    @property
    def content_metadata(self) -> dict[str, Any]:
        """How megatron-core has named and sharded its content; empty if not recorded.

        Raises:
            UserError: it is not a dictionary.
        """
        found = self.common.get("content_metadata") or {}
        with reported_damage(self.folder):
            if not isinstance(found, dict):
                raise DamagedCheckpointError(f"its content_metadata is {shortened(found, 40)}")
        return found

    def read_tensors(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return whole tensors by key, on the CPU; no communication.

        Raises:
            UserError: the files are damaged.
        """
        from torch.distributed.checkpoint.state_dict_loader import load

        with reported_damage(self.folder):
            described = self.metadata.state_dict_metadata
            state = {key: torch.empty(described[key].size, dtype=described[key].properties.dtype) for key in keys}
            load(state, storage_reader=restricted_reader(self.folder), no_dist=True)
        return state

    def read_row(self, key: str, row: int | None = None) -> torch.Tensor:
        """Return one row of a tensor's first axis, or the whole tensor, on the CPU; nothing else is read.

        Raises:
            UserError: the files are damaged.
        """
        from megatron_dwm.training.checkpoint_parts import read_part

        with reported_damage(self.folder):
            described = self.metadata.state_dict_metadata[key]
            size = list(described.size)
            first = [0] * len(size)
            if row is not None:
                first[0], size[0] = row, 1
            target = torch.empty(size, dtype=described.properties.dtype)
            read_part(self.folder, self.metadata, key, first, target)
        return target if row is None else target[0]

    def read_object(self, key: str) -> Any:
        """Return the object saved under ``key``; no communication.

        Raises:
            UserError: the files are damaged.
        """
        with reported_damage(self.folder):
            (place,) = (place for index, place in self.metadata.storage_data.items() if index.fqn == key)
            with (self.folder / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                (value,) = load_restricted(BytesIO(file.read(place.length)))
        return value

    def read_dwm_state(self) -> dict[str, Any]:
        """Return the weighting's state; empty if there is none.

        Raises:
            UserError: it is damaged.
        """
        path = self.folder / DWM_STATE
        with reported_damage(self.folder):
            return dict(read_torch_file(path)) if path.exists() else {}


class DamagedCheckpointError(Exception):
    """Damage of a checkpoint's files; the message names the file."""


def open_checkpoint(folder: Path, *, should_verify: bool = True, rank: int = 0, world_size: int = 1) -> SavedCheckpoint:
    """Open a checkpoint; no communication.

    Args:
        should_verify: whether to verify the files against their checksums.
        rank: rank of this process among those that open it; it verifies its part of the files.

    Raises:
        UserError: it is damaged; the message names the file, and the last intact checkpoint.
    """
    if has_torch_format(folder):
        raise UserError(f"{folder} has the format torch, which only pretrain_dwm.py reads; save it there as torch_dist")
    with reported_damage(folder):
        saved = _open(folder)
        if should_verify:
            require_checksums(folder, rank, world_size)
        return saved


def refuse_special_files(folder: Path) -> None:
    """Refuse a checkpoint in which a named pipe or a device stands in place of a file: reading it would not end.

    Raises:
        DamagedCheckpointError: there is one.
    """
    for part in (folder, *folder.glob("mp_rank_*")):
        if special := find_special_file(part):
            raise DamagedCheckpointError(special)


def require_checksums(folder: Path, rank: int, world_size: int) -> None:
    """Verify one rank's part of a checkpoint's files against their checksums, if there are any.

    Raises:
        DamagedCheckpointError: a file is not as it was written.
    """
    checksums = _checksums(folder)
    if checksums is None:
        logger.info(f" > {folder} was written without checksums; its files are not verified")
    elif damage := find_damage(folder, part_of_rank(checksums, rank, world_size)):
        raise DamagedCheckpointError(damage)


def verify_checkpoint(folder: Path, on_read: Callable[[int], object] = lambda size: None) -> SavedCheckpoint:
    """Open a checkpoint and verify all its files against their checksums, if there are any.

    Args:
        on_read: called with the size of each block that is read.

    Raises:
        DamagedCheckpointError: it is damaged.
    """
    saved = _open(folder)
    _require_all_checksums(folder, on_read)
    return saved


def verify_torch_checkpoint(folder: Path, on_read: Callable[[int], object] = lambda size: None) -> Iterator[Any]:
    """Verify the files of a checkpoint in the format torch against their checksums, if any, and read them.

    Yields:
        the content of each model-parallel rank's file.

    Raises:
        DamagedCheckpointError: it is damaged.
    """
    refuse_special_files(folder)
    _require_all_checksums(folder, on_read)
    for path in sorted(folder.glob("mp_rank_*/*.pt")):
        try:
            yield read_torch_file(path)
        except UnreadableFileError as error:
            raise DamagedCheckpointError(f"{path.parent.name}/{error}") from None


def _require_all_checksums(folder: Path, on_read: Callable[[int], object]) -> None:
    if damage := find_damage(folder, _checksums(folder) or {}, on_read):
        raise DamagedCheckpointError(damage)


@contextlib.contextmanager
def reported_damage(folder: Path) -> Iterator[None]:
    """Turn exceptions of torch and megatron-core for damaged files into a UserError that names the folder.

    Raises:
        UserError: the block failed.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException  # a BaseException: nothing else catches it

    try:
        yield
        return
    except (DamagedCheckpointError, UnreadableFileError) as error:
        reason = str(error)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        reason = short_reason(causes[0] if causes else error)
    except (*DAMAGE, AssertionError, CheckpointingException) as error:
        if is_lost_connection(error):  # a rank was killed while all loaded: nothing is wrong with the files
            raise
        reason = short_reason(error)
    if not folder.is_dir():
        raise UserError(f"--load {folder.parent}: {folder.name} was deleted by its run while it was read; try again")
    raise UserError(f"--load {folder.parent}: {folder.name} is damaged: {reason}; {_remedy(folder)}")


def _open(folder: Path) -> SavedCheckpoint:
    """Read the parts of a :class:`SavedCheckpoint`.

    Raises:
        DamagedCheckpointError: a file is missing or damaged.
    """
    refuse_special_files(folder)
    try:
        described = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        if described["sharded_backend"] != "torch_dist":
            raise ValueError(f"sharded_backend {described['sharded_backend']}, not torch_dist")
    except (KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise DamagedCheckpointError(f"metadata.json cannot be read ({short_reason(error)})") from None
    try:
        common = read_common_state(folder)
        metadata = read_metadata(folder / ".metadata")
    except UnreadableFileError as error:
        raise DamagedCheckpointError(str(error)) from None
    if not isinstance(common, dict) or not isinstance(metadata.state_dict_metadata, dict):
        raise DamagedCheckpointError("common.pt or .metadata is not a checkpoint's")
    return SavedCheckpoint(folder, common, metadata)


def _checksums(folder: Path) -> dict[str, Checksum] | None:
    try:
        return read_checksums(folder)
    except ValueError as error:
        raise DamagedCheckpointError(str(error)) from None


def _remedy(folder: Path) -> str:
    if folder.parent.name == NON_PERSISTENT:
        return "leave out --non-persistent-ckpt-type to load a persistent checkpoint"
    for older in older_checkpoints(folder):
        with contextlib.suppress(DamagedCheckpointError):
            if has_torch_format(older):
                for _ in verify_torch_checkpoint(older):
                    pass
            else:
                verify_checkpoint(older)
            return f"give --ckpt-step {iteration_of(older)}, the last one before it that is whole"
    return "no older checkpoint there is whole"
