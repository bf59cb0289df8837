"""What may be where a program expects one of its own files or folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def _full_folder(path: Path) -> None:
    path.mkdir()
    (path / "file").touch()


OBSTACLES: dict[str, Callable[[Path], object]] = {
    "file": Path.touch,
    "folder": Path.mkdir,
    "full folder": _full_folder,
    "pipe": os.mkfifo,
    "link to a folder": lambda path: path.symlink_to("."),
    "link that leads nowhere": lambda path: path.symlink_to("nowhere/below"),
    "link to itself": lambda path: path.symlink_to(path.name),
}
