"""Named pipes, sockets and devices in place of files: reading one waits for a writer, or does not end."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from megatron_dwm.errors import UserError

_WHAT = "a named pipe, a socket or a device where a file belongs"


def find_special_file(folder: Path) -> str | None:
    """Return a description of the first entry of a folder that is neither a file nor a folder; None if there is none.

    Links count as what they lead to. It is fast: most file systems list the types of entries with their names.
    """
    if not folder.is_dir():
        return None
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_file() and not entry.is_dir() and os.path.exists(entry.path):
                return f"{entry.name} is {_WHAT}"
    return None


def require_plain_files(folder: Path, named: str, remedy: str) -> None:
    """Refuse a folder that holds a special file; a path that is no folder passes.

    Args:
        named: the beginning of the error message, which names the folder.
        remedy: what to do instead.

    Raises:
        UserError: it holds one.
    """
    if special := find_special_file(folder):
        raise UserError(f"{named}: {special}; {remedy}")


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8.

    Raises:
        OSError: it cannot be read, or is no file.
        UnicodeDecodeError: it is not UTF-8.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, _WHAT, str(path))
    return path.read_text(encoding="utf-8")
