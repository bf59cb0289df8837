"""Reading and checking a dataset's index file."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_dwm.data import index_file
from megatron_dwm.data.index_file import DamagedIndexError, IndexFile, sequence_lengths
from tests.unit.data.made_data import write_dataset

HEADER = 34  # bytes before the lengths: 9 of magic, 8 version, 1 type, 8 sequences, 8 boundaries
LENGTHS, PLACES, BOUNDARIES = HEADER, HEADER + 10 * 4, HEADER + 10 * 12  # of ten sequences
DOCUMENTS = [[number] * (40 + number) for number in range(10)]


def changed(at: int, form: str, value: int) -> Callable[[bytes], bytes]:
    """An index with one number changed."""

    def damage(index: bytes) -> bytes:
        packed = struct.pack(form, value)
        return index[:at] + packed + index[at + len(packed) :]

    return damage


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "not an index": lambda index: b"something else altogether, and longer than a header is",
    "empty": lambda index: b"",
    "cut in the magic": lambda index: index[:5],
    "cut in the header": lambda index: index[: HEADER - 3],
    "cut in the lengths": lambda index: index[: HEADER + 6],
    "cut in the places": lambda index: index[: HEADER + 10 * 4 + 9],
    "cut in the documents": lambda index: index[:-5],
    "another version": changed(9, "<Q", 2),
    "unknown type": changed(17, "<B", 77),
    "more sequences than there are": changed(18, "<Q", 10**12),
    "fewer sequences than there are": changed(18, "<Q", 9),
    "no documents": changed(26, "<Q", 0),
    "trailing bytes": lambda index: index + b"12345",
    "a type of other size": changed(17, "<B", 4),
    "a floating-point type": changed(17, "<B", 7),
    "a negative length": changed(LENGTHS, "<i", -1),
    "another length": changed(LENGTHS + 5 * 4, "<i", 44),
    "a negative place": changed(PLACES, "<q", -2),
    "a first place that is not 0": changed(PLACES, "<q", 2),
    "a place behind the data": changed(PLACES + 9 * 8, "<q", 10**9),
    "overlapping sequences": changed(PLACES + 5 * 8, "<q", 300),
    "places that are all 0": lambda index: index[:PLACES] + bytes(80) + index[BOUNDARIES:],
    "a negative boundary": changed(BOUNDARIES + 3 * 8, "<q", -3),
    "a boundary behind the end": changed(BOUNDARIES + 3 * 8, "<q", 10**6),
    "a first boundary that is not 0": changed(BOUNDARIES, "<q", 1),
    "documents that end too early": changed(BOUNDARIES + 10 * 8, "<q", 9),
    "falling boundaries": changed(BOUNDARIES + 4 * 8, "<q", 2),
    # The differences of these, taken in 64 bits, are all positive.
    "boundaries that overflow": lambda index: (
        index[: BOUNDARIES + 8] + struct.pack("<5q", 2**63 - 1, -(2**63), -(2**62), 0, 5) + index[BOUNDARIES + 48 :]
    ),
    "boundaries that are all 0": lambda index: index[:BOUNDARIES] + bytes(88),
    "zeros": lambda index: bytes(len(index)),
}


def test_an_index_is_read_as_it_was_written(tmp_path: Path) -> None:
    index = IndexFile.open(write_dataset(tmp_path, "a", [[1] * 9, [], [2] * 3], dtype=np.int32))
    assert (index.dtype, index.num_sequences, index.num_boundaries) == (np.int32, 2, 4)
    assert index.lengths.tolist() == [9, 3]
    assert index.places.tolist() == [0, 36]
    assert index.boundaries.tolist() == [0, 1, 1, 2]
    assert index.check() == 48


def test_an_index_without_sequences_is_valid_and_has_no_data(tmp_path: Path) -> None:
    index = IndexFile.open(write_dataset(tmp_path, "a", [[], []]))
    assert index.lengths.tolist() == index.places.tolist() == [] and index.check() == 0


def test_lengths_outlive_the_index_they_were_read_from(tmp_path: Path) -> None:
    assert sequence_lengths(write_dataset(tmp_path, "a", [[1] * 9, [], [2] * 3])).tolist() == [9, 3]


@pytest.mark.parametrize("chunk", [1, 3, 2**20])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_is_found_wherever_it_is(
    damage: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_file, "_CHUNK", chunk)
    prefix = write_dataset(tmp_path, "a", DOCUMENTS)
    path = Path(prefix + ".idx")
    assert IndexFile.open(prefix).check() == sum(map(len, DOCUMENTS)) * 2
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(DamagedIndexError):
        IndexFile.open(prefix).check()


def test_progress_counts_every_byte_of_the_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_file, "_CHUNK", 4)
    counts: list[int] = []
    IndexFile.open(write_dataset(tmp_path, "a", DOCUMENTS)).check(counts.append)
    assert counts == [48, 48, 24, 32, 32, 24]  # ten sequences of 12 bytes, eleven boundaries of 8
