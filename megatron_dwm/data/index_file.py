"""The index file (``.idx``) of a dataset: the positions of the token sequences in the data file (``.bin``).

Layout, little-endian: a header of magic, version, code of the token type, number n of sequences and number d of
document boundaries; then n lengths in tokens (int32), n places in bytes (int64), d boundaries in sequences (int64).
A multimodal index ends with n more bytes. Files are memory-mapped: the index of a corpus of terabytes has gigabytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_CHUNK = 2**20  # entries that are checked at a time
# megatron-core's codes; 6 and 7 are floating-point numbers, which are no tokens.
_TOKEN_TYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}


class DamagedIndexError(ValueError):
    """An index file that is not valid; the message says why."""


@dataclass(frozen=True)
class IndexFile:
    """An index file whose header and size fit together."""

    path: Path
    dtype: np.dtype[np.integer[Any]]
    """Type of the tokens in the data file."""
    num_sequences: int
    num_boundaries: int
    """Document boundaries: one more than there are documents."""

    @classmethod
    def open(cls, prefix: str) -> IndexFile:
        """Open ``prefix.idx``.

        Raises:
            DamagedIndexError: the header is not that of an index, or the file does not have the size that it implies.
            OSError: the file cannot be read.
        """
        path = Path(f"{prefix}.idx")
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise DamagedIndexError(f"{len(header)} bytes are too few for a header")
        magic, version, code, num_sequences, num_boundaries = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise DamagedIndexError("its first bytes are not those of an index")
        if version != _VERSION:
            raise DamagedIndexError(f"version {version} instead of {_VERSION}")
        if code not in _TOKEN_TYPES:
            raise DamagedIndexError(f"{code} is not the code of an integer type")
        size = path.stat().st_size
        expected = _HEADER.size + num_sequences * (4 + 8) + num_boundaries * 8
        if size not in (expected, expected + num_sequences):
            raise DamagedIndexError(
                f"{size} bytes instead of the {expected} of {num_sequences} sequences and {num_boundaries} boundaries"
            )
        if num_boundaries == 0:
            raise DamagedIndexError("no document boundary")
        return cls(path, np.dtype(_TOKEN_TYPES[code]), num_sequences, num_boundaries)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each sequence, mapped from the file."""
        return self._map(np.int32, self.num_sequences, _HEADER.size)

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """Where each sequence starts, in bytes, mapped from the file."""
        return self._map(np.int64, self.num_sequences, _HEADER.size + self.num_sequences * 4)

    @property
    def boundaries(self) -> npt.NDArray[np.int64]:
        """Sequences before each document, and at the end all of them, mapped from the file."""
        return self._map(np.int64, self.num_boundaries, _HEADER.size + self.num_sequences * 12)

    def check(self, progress: Callable[[int], object] = lambda size: None) -> int:
        """Check every entry; return the bytes that the data file must have.

        Args:
            progress: called with the number of bytes that were checked since the last call.

        Raises:
            DamagedIndexError: a negative length, a sequence that does not start where the one before it ends, or
                document boundaries that do not run from 0 up to the number of sequences.
        """
        end, lengths, places = 0, self.lengths, self.places
        for chunk in _chunks(self.num_sequences):
            sizes = lengths[chunk].astype(np.int64)
            if sizes.min() < 0:
                number = chunk.start + int(sizes.argmin())
                raise DamagedIndexError(f"sequence {number} has a length of {sizes.min()}")
            ends = end + np.cumsum(sizes * self.dtype.itemsize)
            starts = np.concatenate([[end], ends[:-1]])
            if (wrong := np.flatnonzero(places[chunk] != starts)).size:
                number = chunk.start + int(wrong[0])
                raise DamagedIndexError(
                    f"sequence {number} is at byte {places[number]} instead of {starts[wrong[0]]}, "
                    "where the one before it ends"
                )
            end = int(ends[-1])
            progress(len(sizes) * (lengths.itemsize + places.itemsize))
        before = 0
        for chunk in _chunks(self.num_boundaries):
            boundaries = self.boundaries[chunk]
            if (wrong := np.flatnonzero(boundaries < np.concatenate([[before], boundaries[:-1]]))).size:
                number = chunk.start + int(wrong[0])
                raise DamagedIndexError(
                    f"document boundary {number} is {boundaries[wrong[0]]}, less than the one before"
                )
            if chunk.start == 0 and boundaries[0] != 0:
                raise DamagedIndexError(f"the first document starts at sequence {boundaries[0]} instead of 0")
            before = int(boundaries[-1])
            progress(boundaries.nbytes)
        if before != self.num_sequences:
            raise DamagedIndexError(f"its documents end at sequence {before} instead of {self.num_sequences}")
        return end

    def _map(self, dtype: type[np.generic], count: int, offset: int) -> npt.NDArray[Any]:
        if count == 0:  # nothing can be mapped
            return np.empty(0, dtype=dtype)
        return np.memmap(self.path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def sequence_lengths(prefix: str) -> npt.NDArray[np.int32]:
    """Return the number of tokens of each sequence of a dataset, mapped from its index file."""
    return IndexFile.open(prefix).lengths


def _chunks(count: int) -> Iterator[slice]:
    """Yield consecutive slices of ``count`` entries."""
    for start in range(0, count, _CHUNK):
        yield slice(start, min(start + _CHUNK, count))
