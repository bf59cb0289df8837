"""Checksums of a folder's files, and their verification."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20
"""Bytes that are read at a time."""


@dataclass(frozen=True)
class Checksum:
    """Size and digest of a file."""

    bytes: int
    sha256: str


def checksum(path: Path, on_read: Callable[[int], object] = lambda size: None) -> Checksum:
    """Return a file's checksum, reading it in blocks.

    Args:
        path: the file.
        on_read: called with the size of each block.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
            on_read(len(block))
    return Checksum(size, digest.hexdigest())


def parse_checksums(files: Any) -> dict[str, Checksum]:
    """Parse checksums by relative path from JSON: ``{path: {"bytes": N, "sha256": "..."}}``.

    Raises:
        ValueError: it holds something else.
    """
    try:
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
            raise ValueError("a path that leads out of the folder")
        return {str(name): Checksum(int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (AttributeError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"no checksums ({type(error).__name__})") from None


def find_damage(
    folder: Path, checksums: Mapping[str, Checksum], on_read: Callable[[int], object] = lambda size: None
) -> str | None:
    """Return a description of the first damaged file; None if all files match their checksums.

    Args:
        folder: the folder of the files.
        checksums: checksums by file name.
        on_read: called with the size of each block that is read.
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
