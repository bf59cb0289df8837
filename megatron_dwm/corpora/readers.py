"""Documents from files: JSON lines, plain or compressed, and Parquet, told apart by their first bytes."""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dwm.corpora.storage import files_of_url, is_url, open_file, size_of
from megatron_dwm.errors import UserError, shortened
from megatron_dwm.extras import require_packages

_BATCH = 1024  # rows of a Parquet file that are read at a time
_SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".parquet": "parquet"}
_JSON_SUFFIXES = {".jsonl", ".json", ".ndjson"}
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    **{bytes([0x50 + number]) + b"\x2a\x4d\x18": "zstd" for number in range(16)},  # skippable frames, as pzstd writes
    b"PAR1": "parquet",
    # Formats that are not supported, so that they are named rather than reported as bad JSON.
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7z",
    b"ARROW1": "Arrow IPC",
    b"Obj\x01": "Avro",
    b"ORC": "ORC",
    b"\x89HDF": "HDF5",
    b"SQLite format 3": "SQLite",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_TEXTS = {".csv": "CSV", ".tsv": "TSV", ".txt": "plain text", ".md": "Markdown", ".html": "HTML", ".xml": "XML"}
"""Formats that are recognized by the name, unless the content is JSON lines."""
MANIFEST_SUFFIX = ".manifest.json"
"""Ending of the names of files that describe a selection next to them."""
_READ = ("JSON lines", "gzip", "zstd", "parquet")


class Record(NamedTuple):
    """A line of JSON, or a row of a table, of which ``content`` holds the wanted columns.

    Bytes of a line that are not UTF-8 are escaped as lone surrogates.
    """

    path: str
    number: int  # of the line or row, counted from 1
    content: str | dict[str, Any]

    @property
    def place(self) -> str:
        """Where the record is, for messages."""
        return f"{self.path}, {'line' if isinstance(self.content, str) else 'row'} {self.number}"


def input_files(patterns: Sequence[str]) -> list[str]:
    """Return the files that the patterns name: a file, a folder with all files below it, or a glob pattern; or URLs.

    Raises:
        UserError: a pattern matches nothing, or a folder holds no file of a known suffix.
    """
    files: list[str] = []
    for pattern in patterns:
        if is_url(pattern):
            matches = [url for url in files_of_url(pattern) if url == pattern or _is_input(Path(url))]
            if not matches:
                raise UserError(f"--input {pattern}: no such file; check the URL or pattern")
        elif os.path.isdir(pattern):
            matches = sorted(str(path) for path in Path(pattern).rglob("*") if path.is_file() and _is_input(path))
            if not matches:
                raise UserError(
                    f"--input {pattern}: the folder holds no file named *.jsonl, *.json, *.ndjson (also with .gz or "
                    ".zst) or *.parquet; give the files or a pattern"
                )
        elif os.path.exists(pattern):  # a file or a pipe
            matches = [pattern]
        else:
            # Not sorted: Megatron-LM's tool takes the file system's order, and the datasets must be the same.
            matches = [path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path)]
            if not matches:
                raise UserError(f"--input {pattern}: no such file; check the path or pattern")
        files += matches
    return files


def _is_input(path: Path) -> bool:
    if path.name.endswith(MANIFEST_SUFFIX):
        return False
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst", ".zstd"):
        suffixes.pop()
    return not path.name.startswith(".") and bool(suffixes) and suffixes[-1] in {*_JSON_SUFFIXES, ".parquet"}


def without_suffixes(path: str) -> str:
    """Return a file's name without the suffixes of the formats that are read."""
    name = Path(path).name
    for known in (_SUFFIXES, _JSON_SUFFIXES):
        stem, suffix = os.path.splitext(name)
        name = stem if suffix.lower() in known else name
    return name


class Reader:
    """The records of files, one file after the other, and the position of reading."""

    def __init__(self, paths: Sequence[str], columns: Sequence[str] | None) -> None:
        """Check the formats of the files.

        Args:
            columns: columns of tables that are read, None for all; lines are read completely.

        Raises:
            UserError: a file cannot be opened or has a format that is not read.
        """
        self._paths, self._columns = paths, columns
        self._sizes = [size_of(path) for path in paths]
        for path in paths:
            if is_url(path) or os.path.isfile(path):  # a pipe can be read only once
                with _open(path) as file:
                    _format_of(path, file)
        self._finished = 0
        self._in_file: Callable[[], int] = lambda: 0

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self._sizes)

    @property
    def position(self) -> int:
        """Bytes of the files that were read, before decompression."""
        return self._finished + self._in_file()

    def __iter__(self) -> Iterator[Record]:
        """Yield the records.

        Raises:
            UserError: a file cannot be read to its end, or a table has no column of that name.
        """
        for path, size in zip(self._paths, self._sizes, strict=True):
            number = 0
            try:
                with _open(path) as file:
                    if file.seekable():
                        self._in_file = file.tell
                    for number, content in self._contents(path, file):
                        yield Record(path, number, content)
                    self._in_file = lambda: 0
            except (OSError, EOFError, zlib.error, UnicodeDecodeError, _arrow_error()) as error:
                raise UserError(
                    f"--input {path}: unreadable after record {number} ({shortened(error)}); check the file"
                ) from error
            self._finished += size

    def _contents(self, path: str, file: io.BufferedReader) -> Iterator[tuple[int, str | dict[str, Any]]]:
        kind = _format_of(path, file)
        if kind == "parquet":
            yield from enumerate(_rows(path, file, self._columns), start=1)
            return
        stream: Any = file
        if kind == "gzip":
            stream = gzip.GzipFile(fileobj=file)
        elif kind == "zstd":
            # Not the zstandard package: it does not notice that a file was cut off.
            stream = _pyarrow(path).input_stream(file, compression="zstd")
        yield from numbered_lines(io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape"))


def numbered_lines(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield a file's lines with their numbers from 1 on; like pyarrow, without byte order mark and blank lines."""
    for number, line in enumerate(lines, start=1):
        content = line.removeprefix("\ufeff") if number == 1 else line
        if content and not content.isspace():
            yield number, content


def file_format(path: str) -> str:
    """Return the format of a file by its first bytes.

    Raises:
        UserError: it cannot be read, or is not what its name says.
    """
    with _open(path) as file:
        return _format_of(path, file)


def table_schema(path: str) -> Any:
    """Return pyarrow's schema of a Parquet file, the names and types of its columns; None for another file.

    Raises:
        UserError: it cannot be opened, or is not what its name says.
    """
    with _open(path) as file:
        if _format_of(path, file) != "parquet":
            return None
        import pyarrow.parquet

        return pyarrow.parquet.read_schema(file)


def _open(path: str) -> io.BufferedReader:
    """Open a file.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        return open_file(path)
    except OSError as error:
        raise UserError(f"--input {path}: cannot be opened ({error.strerror}); check the file") from None


def _format_of(path: str, file: io.BufferedReader) -> str:
    """Return the format of a file by its next bytes, which stay unread and must agree with its name.

    Raises:
        UserError: it cannot be read, is of a format that is not read, or is not what its name says.
    """
    try:
        start = file.peek(16)
    except OSError as error:
        raise UserError(f"--input {path}: cannot be read ({error.strerror}); check the file") from None
    kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), "JSON lines")
    suffix = os.path.splitext(path)[1].lower()
    if kind == "JSON lines" and (text := start.removeprefix(codecs.BOM_UTF8).lstrip()) and not text.startswith(b"{"):
        kind = _TEXTS.get(suffix, kind)
    if kind not in _READ:
        raise UserError(
            f"--input {path}: {kind} files are not supported; give JSON lines, plain or compressed with gzip or zstd, "
            "or Parquet"
        )
    named = _SUFFIXES.get(suffix)
    if named is not None and kind != named and start:
        raise UserError(f"--input {path}: its name says {named}, but its content is not {named}; check the file")
    return kind


def _rows(path: str, file: io.BufferedReader, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file as objects of the wanted columns."""
    _pyarrow(path)
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
    for column in columns or ():
        if column not in table.schema_arrow.names:
            raise UserError(
                f"--input {path}: no column {column!r}, it has {shortened(', '.join(table.schema_arrow.names))}; give "
                "another --json-keys"
            )
    for batch in table.iter_batches(batch_size=_BATCH, columns=None if columns is None else list(columns)):
        yield from batch.to_pylist()


def _pyarrow(path: str) -> Any:
    """Return the pyarrow module.

    Raises:
        UserError: it is not installed.
    """
    require_packages(f"--input {path}: reading it", "pyarrow")
    import pyarrow

    return pyarrow


def _arrow_error() -> type[Exception]:
    """Return the base class of pyarrow's errors; without pyarrow, an error that is caught in any case."""
    try:
        from pyarrow import ArrowException
    except ImportError:
        return EOFError
    error: type[Exception] = ArrowException
    return error
