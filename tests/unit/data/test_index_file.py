"""Reading a dataset's index file."""

from __future__ import annotations

from pathlib import Path

from megatron_dwm.data.index_file import sequence_lengths
from tests.unit.data.made_data import write_dataset


def test_lengths_outlive_the_index_they_were_read_from(tmp_path: Path) -> None:
    assert sequence_lengths(write_dataset(tmp_path, "a", [[1] * 9, [], [2] * 3])).tolist() == [9, 3]
