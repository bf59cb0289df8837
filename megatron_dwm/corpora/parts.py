"""Parts of files, so that several processes can share a large file, and the records of a part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_dwm.corpora.readers import Reader, Record, file_format, numbered_lines
from megatron_dwm.corpora.storage import is_url, size_of
from megatron_dwm.errors import UserError


@dataclass(frozen=True)
class Part:
    """A part of an input, which one task reads."""

    kind: Literal["file", "lines", "dataset"]
    """A whole file, the lines that begin in a range of its bytes, or a range of a dataset's documents."""
    path: str
    """The file, or the prefix of the dataset."""
    start: int = 0
    end: int = 0


def file_parts(paths: Sequence[str], split_bytes: int) -> list[Part]:
    """Return the parts of files or URLs, in order.

    Args:
        split_bytes: size above which files of JSON lines on this machine are divided.

    Raises:
        UserError: a file cannot be read, or is not what its name says.
    """
    parts: list[Part] = []
    for path in paths:
        size = size_of(path)
        if not is_url(path) and size > split_bytes and file_format(path) == "JSON lines":
            parts += [Part("lines", path, *bound) for bound in divided(size, size, split_bytes)]
        else:
            parts.append(Part("file", path, 0, size))
    return parts


def divided(count: int, size: int, split_bytes: int) -> list[tuple[int, int]]:
    """Return the bounds of parts of ``count`` items, ``size`` bytes in all, each of about ``split_bytes`` at most."""
    number = max(1, min(count, -(-size // split_bytes)))
    return [(count * n // number, count * (n + 1) // number) for n in range(number)]


def records_of(part: Part, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """Yield the records of a part of a file; lines of a range of bytes are numbered from its start.

    Args:
        columns: columns of a table that are read; None for all.

    Raises:
        UserError: the file cannot be read.
    """
    if part.kind == "file":
        yield from Reader([part.path], columns)
        return
    try:
        with open(part.path, "rb") as file:
            if part.start:
                file.seek(part.start - 1)
                file.readline()  # the rest of a line that begins in the part before
            lines = iter(lambda: file.readline() if file.tell() < part.end else b"", b"")
            place = f"{part.path} from byte {part.start} on"
            texts = (line.decode("utf-8", "surrogateescape").replace("\r\n", "\n") for line in lines)
            for number, line in numbered_lines(texts):
                yield Record(place, number, line)
    except OSError as error:
        raise UserError(f"--input {part.path}: cannot be read ({error.strerror}); check the file") from None
