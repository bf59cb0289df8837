"""Files on this machine, or behind a URL such as ``s3://bucket/corpus`` (fsspec; S3 needs the package s3fs)."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_dwm.atomic_write import atomic_write_text, remove, sync
from megatron_dwm.errors import UserError, shortened


def is_url(path: str) -> bool:
    """Return whether a path is a URL."""
    return "://" in path


def absolute(path: str) -> str:
    """Return the path from the root of the file system; a URL as it is."""
    return path.rstrip("/") if is_url(path) else os.path.abspath(path)


def size_of(path: str) -> int:
    """Return the bytes of a file.

    Raises:
        UserError: it is behind a URL, and cannot be reached.
    """
    if not is_url(path):
        return os.path.getsize(path)
    fs, inner = _file_system(path)
    with _refused_url(path):
        return int(fs.size(inner))


def stamp_of(path: str) -> tuple[int, str]:
    """Return the size of a file and its version: the time of the last change, or what the storage provides.

    Raises:
        UserError: it is behind a URL, and cannot be reached.
    """
    if not is_url(path):
        status = os.stat(path)
        return status.st_size, str(status.st_mtime_ns)
    fs, inner = _file_system(path)
    with _refused_url(path):
        found = fs.info(inner)
    return int(found["size"]), str(found.get("ETag") or found.get("mtime") or found.get("LastModified"))


def open_file(path: str) -> io.BufferedReader:
    """Open a file for reading.

    Raises:
        OSError: it cannot be opened.
        UserError: it is behind a URL, and cannot be reached.
    """
    if not is_url(path):
        return open(path, "rb")
    fs, inner = _file_system(path)
    with _refused_url(path):
        return io.BufferedReader(fs.open(inner, "rb"))


def files_of_url(pattern: str) -> list[str]:
    """Return the files that a URL names, in the order of their names: one, those below a folder, or those of a pattern.

    Raises:
        UserError: the store cannot be reached.
    """
    fs, inner = _file_system(pattern)
    with _refused_url(pattern):
        if any(letter in inner for letter in "*?["):
            found = [path for path in fs.glob(inner) if not fs.isdir(path)]
        else:
            found = fs.find(inner)
        return sorted(fs.unstrip_protocol(path) for path in found)


@contextmanager
def _refused_url(url: str) -> Iterator[None]:
    """Convert any error to a UserError, inside the context: each kind of storage has its own errors."""
    try:
        yield
    except Exception as error:
        raise UserError(f"--input {url}: cannot be read ({shortened(error)}); check the URL") from None


class OutputFolder:
    """A folder, also behind a URL, in which files get their names when they are complete."""

    def __init__(self, location: str) -> None:
        """
        Raises:
            UserError: it is behind a URL that no installed package reads.
        """
        self.location = absolute(location)
        self._fs: Any = None
        self._root = self.location
        if is_url(location):
            self._fs, self._root = _file_system(self.location, "--output")

    def path(self, name: str) -> str:
        """Return the path or URL of a file or folder in it."""
        return f"{self.location}/{name}"

    def read(self, name: str) -> str | None:
        """Return the text of a file; None if there is none."""
        if self._fs is None:
            file = Path(self.path(name))
            return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
        inner = f"{self._root}/{name}"
        return self._fs.cat_file(inner).decode() if self._fs.exists(inner) else None

    def write(self, name: str, text: str) -> None:
        """Write a file."""
        if self._fs is None:
            atomic_write_text(Path(self.path(name)), text)
        else:
            self._make_folder_of(name)
            self._fs.pipe_file(f"{self._root}/{name}", text.encode())

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file for writing; it is synced to disk when the context ends."""
        if self._fs is not None:
            self._make_folder_of(name)
            with self._fs.open(f"{self._root}/{name}", "wb") as file:
                yield file
            return
        path = Path(self.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a file."""
        with open_file(self.path(name)) as file:
            return file.read()

    def exists(self, name: str) -> bool:
        """Return whether there is such a file."""
        return os.path.exists(self.path(name)) if self._fs is None else bool(self._fs.exists(f"{self._root}/{name}"))

    def remove(self, first: str, keep: str | None = None) -> None:
        """Remove the folder and its content, if it exists.

        Args:
            first: the file that is removed before all others.
            keep: a file of this machine that stays, and the folder with it.
        """
        if self._fs is None:
            remove(Path(self.path(first)))
            for path in Path(self.location).iterdir() if keep is not None else ():
                if path.name != keep:
                    remove(path)
            if keep is None:
                remove(Path(self.location))
        elif self._fs.exists(self._root):
            if self.exists(first):
                self._fs.rm_file(f"{self._root}/{first}")
            self._fs.rm(self._root, recursive=True)

    def has_files(self) -> bool:
        """Return whether the folder exists and is not empty."""
        if self._fs is None:
            return os.path.isdir(self.location) and any(os.scandir(self.location))
        return bool(self._fs.exists(self._root) and self._fs.ls(self._root))

    def move(self, name: str, to: str) -> None:
        """Rename a complete file, if it exists."""
        source, target = self.path(name), self.path(to)
        if self._fs is not None:
            if self._fs.exists(f"{self._root}/{name}"):
                self._make_folder_of(to)
                self._fs.mv(f"{self._root}/{name}", f"{self._root}/{to}")
        elif os.path.exists(source):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            sync(Path(source))
            os.replace(source, target)
            sync(Path(target).parent)

    def _make_folder_of(self, name: str) -> None:
        """Create the folder of a file on this machine; other storage creates folders with their files, or has none."""
        from fsspec.implementations.local import LocalFileSystem

        if isinstance(self._fs, LocalFileSystem):
            self._fs.makedirs(os.path.dirname(f"{self._root}/{name}"), exist_ok=True)


def _file_system(url: str, flag: str = "--input") -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it.

    Raises:
        UserError: there is none of that name, or its package is missing.
    """
    import fsspec

    try:
        fs, inner = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{flag} {url}: {shortened(error)}; install that package, or give a path") from None
    return fs, inner.rstrip("/")
