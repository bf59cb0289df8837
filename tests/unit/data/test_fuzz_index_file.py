"""Any file in the place of an index is one that megatron-core reads as a whole dataset, or is refused in one line."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from hypothesis import given, strategies
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_dwm.data.validation import check_dataset
from megatron_dwm.errors import UserError
from tests.fuzzing import damaged, fuzz_settings
from tests.unit.data.made_data import write_dataset

TOKENS = 60
VOCAB = 200

documents = strategies.lists(
    strategies.lists(strategies.integers(0, VOCAB - 1), max_size=20), min_size=1, max_size=8
).filter(any)
types: strategies.SearchStrategy[type[np.number]] = strategies.sampled_from([np.uint8, np.uint16, np.int32, np.int64])


def is_accepted(prefix: str) -> bool:
    """Whether the dataset passes; if not, its refusal is one line that names it and does not repeat its content."""
    try:
        check_dataset(f"--data-path {prefix}", prefix, VOCAB)
    except UserError as error:
        message = str(error)
        assert prefix in message and "\n" not in message and len(message) < len(prefix) * 3 + 300, message
        return False
    return True


def assert_megatron_core_reads_all(prefix: str) -> None:
    """Its sequences, one after the other, are the whole data, and its documents hold all sequences."""
    dataset = IndexedDataset(prefix)
    sequences = [np.array(dataset[number]) for number in range(len(dataset))]
    assert b"".join(sequence.tobytes() for sequence in sequences) == Path(prefix + ".bin").read_bytes()
    boundaries = dataset.document_indices.tolist()
    assert boundaries[0] == 0 and boundaries[-1] == len(sequences) and boundaries == sorted(boundaries)


@fuzz_settings(100)
@given(data=strategies.data())
def test_a_damaged_index_is_refused_or_is_still_one(data: strategies.DataObject, tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path, "a", data.draw(documents), dtype=data.draw(types))
    assert is_accepted(prefix)
    assert_megatron_core_reads_all(prefix)
    index = Path(prefix + ".idx")
    index.write_bytes(data.draw(damaged(index.read_bytes())))
    before = sorted(tmp_path.iterdir())
    if is_accepted(prefix):
        assert_megatron_core_reads_all(prefix)
    assert sorted(tmp_path.iterdir()) == before


numbers = strategies.one_of(
    strategies.integers(-3, TOKENS), strategies.sampled_from([10**6, 2**31 - 1, 2**62, -(2**62)])
)


@fuzz_settings(100)
@given(
    code=strategies.integers(0, 255),
    counts=strategies.tuples(strategies.integers(0, 9), strategies.integers(0, 9)),
    lengths=strategies.lists(numbers.map(lambda number: max(-(2**31), min(number, 2**31 - 1))), max_size=6),
    places=strategies.lists(numbers, max_size=6),
    boundaries=strategies.lists(numbers, max_size=6),
    is_consistent=strategies.booleans(),
)
def test_an_index_of_any_numbers_is_refused_or_describes_the_data(
    code: int,
    counts: tuple[int, int],
    lengths: list[int],
    places: list[int],
    boundaries: list[int],
    is_consistent: bool,
    tmp_path: Path,
) -> None:
    """The file is well-formed; with ``is_consistent`` its counts are those of its numbers too."""
    prefix = str(tmp_path / "a")
    Path(prefix + ".bin").write_bytes(bytes(TOKENS))
    if is_consistent:
        code, counts = 1, (len(lengths), len(boundaries))
        places = (places + [0] * 6)[: len(lengths)]
    Path(prefix + ".idx").write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, *counts)
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(places)}q", *places)
        + struct.pack(f"<{len(boundaries)}q", *boundaries)
    )
    if is_accepted(prefix):
        assert_megatron_core_reads_all(prefix)
