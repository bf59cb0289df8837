"""Writing so that what is there is whole: beside its place first, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that becomes ``folder`` when the block ends, in place of one that was there.

    If the block raises, ``folder`` is as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        publish_folder(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; its files are moved into ``folder`` when the block ends, in the order of their names.

    Each file appears whole, in place of one that was there. If the block raises, ``folder`` is as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".tmp{os.getpid()}-") as scratch:
        yield Path(scratch)
        written = sorted(Path(scratch).iterdir())
        for path in written:
            sync(path)
        for path in written:
            os.replace(path, folder / path.name)
        sync(folder)


def publish_folder(beside: Path, folder: Path) -> None:
    """Have what is below ``beside`` on the disk, and make it ``folder``; one that was there goes only afterwards."""
    for path in (*beside.rglob("*"), beside):
        sync(path)
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(beside, folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Write ``text`` beside ``path``, then put it in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    sync(beside)
    os.replace(beside, path)


def sync(path: Path) -> None:
    """Have a file or a folder's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
