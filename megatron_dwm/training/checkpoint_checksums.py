"""Checksums of a checkpoint's files: written with it to ``checksums.json``, verified before it is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKSUMS = "checksums.json"
_PARTIAL = ".checksums.rank{}.json"
_BLOCK = 1 << 20
"""Bytes that are read at a time, whatever a file's size."""


@dataclass(frozen=True)
class Checksum:
    """What a file was when it was written."""

    bytes: int
    sha256: str


def checksum(path: Path, on_read: Callable[[int], object] = lambda size: None) -> Checksum:
    """Return a file's checksum, reading it in blocks.

    Args:
        on_read: told the size of each block.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
            on_read(len(block))
    return Checksum(size, digest.hexdigest())


def write_rank_checksums(folder: Path, rank: int, files: Iterable[Path]) -> None:
    """Leave the checksums of the files that one rank has written in ``folder`` for :func:`write_checksums`."""
    sums = {path.name: vars(checksum(path)) for path in files}
    (folder / _PARTIAL.format(rank)).write_text(json.dumps(sums))


def write_checksums(folder: Path) -> None:
    """Write ``checksums.json`` for all files in ``folder``, with what the ranks have left of theirs."""
    sums: dict[str, Any] = {}
    for partial in folder.glob(_PARTIAL.format("*")):
        sums.update(json.loads(partial.read_text()))
        partial.unlink()
    for path in folder.iterdir():
        if path.is_file() and path.name not in sums and path.name != CHECKSUMS:
            sums[path.name] = vars(checksum(path))
    content = {"algorithm": "sha256", "files": dict(sorted(sums.items()))}
    (folder / CHECKSUMS).write_text(json.dumps(content, indent=1) + "\n")


def read_checksums(folder: Path) -> dict[str, Checksum] | None:
    """Return the checksums of a checkpoint's files by name; None if it was written without.

    Raises:
        ValueError: ``checksums.json`` is not what :func:`write_checksums` writes.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return None
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        if any(Path(name).name != name for name in files):
            raise ValueError("a path where a name belongs")
        return {str(name): Checksum(int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{CHECKSUMS} cannot be read ({type(error).__name__})") from None


def find_damage(
    folder: Path, checksums: Mapping[str, Checksum], on_read: Callable[[int], object] = lambda size: None
) -> str | None:
    """Return what is wrong with the first of the files that is not as it was written; None if all are.

    Args:
        on_read: told the size of each block that is read.
    """
    for name, expected in checksums.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected.bytes:
                return f"{name} has {size} bytes, {expected.bytes} were written"
            if checksum(path, on_read) != expected:
                return f"{name} has another sha256 than when it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def part_of_rank(checksums: Mapping[str, Checksum], rank: int, world_size: int) -> dict[str, Checksum]:
    """Return the checksums that one of several ranks verifies; together they verify all, each about as many bytes."""
    by_size = sorted(checksums.items(), key=lambda item: (-item[1].bytes, item[0]))
    return dict(by_size[rank::world_size])
