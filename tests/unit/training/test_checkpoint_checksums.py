"""Every change of a checkpoint's files is found and named."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megatron_dwm.checksums import Checksum, find_damage
from megatron_dwm.training.checkpoint_checksums import (
    CHECKSUMS,
    part_of_rank,
    read_checksums,
    write_checksums,
    write_rank_checksums,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with files of several ranks and their checksums."""
    generator = random.Random(1)
    for name, size in (("__0_0.distcp", 3_000_000), ("__1_0.distcp", 70), ("common.pt", 1000), ("empty", 0)):
        (tmp_path / name).write_bytes(generator.randbytes(size))
    write_rank_checksums(tmp_path, 1, [tmp_path / "__1_0.distcp"])
    write_checksums(tmp_path)
    return tmp_path


def test_all_files_are_covered_and_nothing_is_left_beside(folder: Path):
    checksums = read_checksums(folder)
    assert checksums is not None and find_damage(folder, checksums) is None
    assert set(checksums) == {"__0_0.distcp", "__1_0.distcp", "common.pt", "empty"}
    assert sorted(path.name for path in folder.iterdir()) == sorted([*checksums, CHECKSUMS])


def test_checksums_that_a_full_disk_has_cut_are_computed_again(folder: Path):
    whole = read_checksums(folder)
    write_rank_checksums(folder, 1, [folder / "__1_0.distcp"])
    (written,) = folder.glob(".checksums*")
    written.write_text(written.read_text()[:-9])
    write_checksums(folder)
    assert read_checksums(folder) == whole and not written.exists()


def test_single_bits_anywhere_are_found(folder: Path):
    checksums = read_checksums(folder)
    assert checksums is not None
    generator = random.Random(2)
    for _ in range(40):
        name = generator.choice(["__0_0.distcp", "__1_0.distcp", "common.pt"])
        content = bytearray((folder / name).read_bytes())
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        assert find_damage(folder, checksums) == f"{name} has another sha256 than when it was written"
        (folder / name).write_bytes(whole)
    assert find_damage(folder, checksums) is None


def test_missing_shorter_and_unreadable_files_are_named(folder: Path):
    checksums = read_checksums(folder)
    assert checksums is not None
    (folder / "common.pt").write_bytes(b"short")
    assert find_damage(folder, checksums) == "common.pt has 5 bytes, 1000 were written"
    (folder / "common.pt").unlink()
    assert find_damage(folder, checksums) == "common.pt is missing"
    (folder / "common.pt").mkdir()
    assert "common.pt has" in str(find_damage(folder, checksums))


def test_ranks_share_the_work_and_leave_nothing_out():
    checksums = {str(n): Checksum(n, "") for n in range(23)}
    parts = [part_of_rank(checksums, rank, 4) for rank in range(4)]
    assert sum(map(len, parts)) == 23 and {name for part in parts for name in part} == set(checksums)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"files": 3}',
        '{"files": {"a": {"bytes": 1}}}',
        '{"files": {"../a": {"bytes": 1, "sha256": ""}}}',
    ],
)
def test_damaged_checksums_are_not_taken_for_none(content: str, folder: Path):
    (folder / CHECKSUMS).write_text(content)
    with pytest.raises(ValueError, match=CHECKSUMS):
        read_checksums(folder)


def test_a_checkpoint_without_checksums_has_none(tmp_path: Path):
    assert read_checksums(tmp_path) is None


def test_what_is_read_is_reported(folder: Path):
    read: list[int] = []
    checksums = read_checksums(folder)
    assert checksums is not None
    find_damage(folder, checksums, read.append)
    assert sum(read) == 3_001_070 and max(read) <= 1 << 20
    assert json.loads((folder / CHECKSUMS).read_text())["algorithm"] == "sha256"
