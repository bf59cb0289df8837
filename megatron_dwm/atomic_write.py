"""Atomic writing of files and folders: under a temporary name, synced to disk, then renamed.

A process that is killed meanwhile leaves the previous content, and at most an entry whose name starts with a dot:
``.NAME.<machine>.tmp<pid>`` (not finished), ``.NAME.replaced`` (the old content) or ``.NAME.deleted`` (being deleted).
:func:`remove_leftovers` removes them. What is not finished is also removed when the same is written again on the same
machine.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

_LEFTOVER = re.compile(r"\..+\.(tmp\d+(-\d+)?|partial|deleted)")
_REPLACED = re.compile(r"\.(.+)\.replaced")
_FILES = "files"
"""In place of a file's name, in the name of the temporary folder of :func:`atomic_files`."""


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, which replaces ``folder`` when the block ends.

    If the block raises, ``folder`` is as it was, and a parent folder that was made for it is removed.
    """
    is_parent_new = not folder.parent.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(folder)
    temporary = _temporary_path(folder)
    remove(temporary)
    temporary.mkdir()
    try:
        yield temporary
        publish_folder(temporary, folder)
    finally:
        remove(temporary)
        if is_parent_new:
            with contextlib.suppress(OSError):  # it is not empty after a success
                folder.parent.rmdir()


@contextlib.contextmanager
def atomic_files(folder: Path, prefix: str = "", *, should_clear: bool = True) -> Iterator[Path]:
    """Yield an empty folder; when the block ends, each file in it is moved to ``folder``, as ``prefix`` + its name.

    The files replace those of the same names, one after the other in the order of their names. If the block raises,
    ``folder`` is as it was.

    Args:
        should_clear: whether to remove first what killed processes have left, for which the folder is listed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if should_clear:
        _remove_unfinished(folder / f"{prefix}{_FILES}")
    # Threads of one process may write to the same folder.
    temporary = _temporary_path(folder / f"{prefix}{_FILES}", f"-{threading.get_ident()}")
    remove(temporary)
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(temporary.iterdir())
        for file in files:
            _give_usual_permissions(file)
            sync(file)
        for file in files:
            os.replace(file, folder / f"{prefix}{file.name}")
        sync(folder)
    finally:
        remove(temporary)


def publish_folder(temporary: Path, folder: Path) -> None:
    """Rename the finished folder ``temporary`` to ``folder``; an existing folder is deleted only afterwards."""
    for path in (*temporary.rglob("*"), temporary):
        _give_usual_permissions(path)
        sync(path)
    replaced = folder.with_name(f".{folder.name}.replaced")
    remove(replaced)
    if os.path.lexists(folder):
        os.rename(folder, replaced)
    os.rename(temporary, folder)
    sync(folder.parent)
    remove(replaced)


def delete_folder(folder: Path) -> None:
    """Delete ``folder`` so that an interruption leaves either all of it or nothing under its name."""
    deleted = folder.with_name(f".{folder.name}.deleted")
    remove(deleted)
    os.rename(folder, deleted)
    remove(deleted)


def atomic_write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, replacing the file that was there."""
    atomic_write_bytes(path, text.encode())


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, replacing the file that was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_path(path)
    try:
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what interrupted writers left in ``folder``, and undo incomplete replacements.

    Must not be called while another process writes there.

    Returns:
        what was removed or put back.
    """
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if replaced := _REPLACED.fullmatch(path.name):
            original = folder / replaced[1]
            if path.is_dir() and not os.path.lexists(original):
                os.rename(path, original)
            else:
                remove(path)
        elif _LEFTOVER.fullmatch(path.name):
            remove(path)
        if not os.path.lexists(path):
            found.append(path)
    return found


def remove(path: Path) -> None:
    """Remove what is at ``path``, as far as possible: a folder with its content, or a file, a link, a pipe."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        with contextlib.suppress(OSError):  # ``rmtree`` would wait for the writer of a pipe
            path.unlink()


def _temporary_path(path: Path, suffix: str = "") -> Path:
    return path.with_name(f".{path.name}.{_machine()}.tmp{os.getpid()}{suffix}")


def remove_unfinished_files(folder: Path) -> None:
    """Remove what processes of this machine had not finished in :func:`atomic_files` when they were killed."""
    if folder.is_dir():
        _remove_unfinished(folder / _FILES)


def _remove_unfinished(path: Path) -> None:
    """Remove what processes of this machine had not finished writing to ``path`` when they were killed."""
    name = re.compile(rf"\.{re.escape(path.name)}\.{_machine()}\.tmp(\d+)(-\d+)?")
    for entry in path.parent.iterdir():
        if (match := name.fullmatch(entry.name)) and not Path("/proc", match[1]).exists():
            remove(entry)


def _machine() -> str:
    """Return a name of the machine, or of the container, that process IDs refer to."""
    name = f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return f"{zlib.crc32(name.encode()):08x}"


def _give_usual_permissions(path: Path) -> None:
    """Set the permissions that the umask allows: some libraries make files that only their owner can read."""
    umask = os.umask(0o077)  # it can only be read by setting it
    os.umask(umask)
    os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~umask)
