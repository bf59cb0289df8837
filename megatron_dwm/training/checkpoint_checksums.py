"""Checksums of a checkpoint's files: written with it to ``checksums.json``, verified before it is loaded."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_dwm.checksums import Checksum, checksum, parse_checksums

CHECKSUMS = "checksums.json"
_PARTIAL = ".checksums.rank{}.json"


def write_rank_checksums(folder: Path, rank: int, files: Iterable[Path]) -> None:
    """Write the checksums of the files that one rank has written to ``folder``, for :func:`write_checksums`."""
    sums = {path.name: vars(checksum(path)) for path in files}
    (folder / _PARTIAL.format(rank)).write_text(json.dumps(sums))


def write_checksums(folder: Path) -> None:
    """Write ``checksums.json`` for all files in ``folder``, from the checksums that the ranks have written."""
    sums: dict[str, Any] = {}
    for partial in folder.glob(_PARTIAL.format("*")):
        with contextlib.suppress(ValueError):  # the disk was full when it was written
            sums.update(json.loads(partial.read_text()))
        partial.unlink()
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in sums and name != CHECKSUMS:
            sums[name] = vars(checksum(path))
    content = {"algorithm": "sha256", "files": dict(sorted(sums.items()))}
    (folder / CHECKSUMS).write_text(json.dumps(content, indent=1) + "\n")


def read_checksums(folder: Path) -> dict[str, Checksum] | None:
    """Return the checksums of a checkpoint's files by relative path; None if it was written without checksums.

    Raises:
        ValueError: ``checksums.json`` is not what :func:`write_checksums` writes.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return None
    try:
        return parse_checksums(json.loads(path.read_text(encoding="utf-8"))["files"])
    except (KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{CHECKSUMS} cannot be read ({type(error).__name__})") from None


def part_of_rank(checksums: Mapping[str, Checksum], rank: int, world_size: int) -> dict[str, Checksum]:
    """Return the checksums that this rank verifies; the ranks together verify all, about equally many bytes each."""
    by_size = sorted(checksums.items(), key=lambda item: (-item[1].bytes, item[0]))
    return dict(by_size[rank::world_size])
