"""Files that cannot be read: named pipes, sockets and devices, which do not end, and those without permission."""

from __future__ import annotations

import errno
import os
from itertools import chain
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


def require_permission(folder: Path, named: str) -> None:
    """Refuse a checkpoint or model folder with missing read permissions, so that it is not reported as damaged.

    Args:
        named: the beginning of the error message, which names the folder.

    Raises:
        UserError: this process may not read the folder, or a file in it.
    """
    # The folder comes first: if it may not be listed, no file in it is found.
    for path in chain((folder,), folder.glob("*"), folder.glob("mp_rank_*/*")):
        if os.path.exists(path) and not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
            raise UserError(f"{named}: {path.name} may not be read (Permission denied); give this user the permission")


def require_plain_files(folder: Path, named: str, remedy: str) -> None:
    """Refuse a folder that holds a special file, or a file without read permission; a path that is no folder passes.

    Args:
        named: the beginning of the error message, which names the folder.
        remedy: what to do instead.

    Raises:
        UserError: it holds such a file.
    """
    require_permission(folder, named)
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
