"""What is written is whole, and what was there is lost to nothing but its successor."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dwm.atomic_write import atomic_folder, atomic_write_text, publish_folder


def test_a_folder_replaces_the_one_that_was_there(tmp_path: Path):
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "folder") as beside:
            (beside / "file").write_text(content)
            (beside / content).mkdir()
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["file", "second"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_block_that_fails_leaves_the_old_folder(tmp_path: Path):
    with atomic_folder(tmp_path / "folder") as beside:
        (beside / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "folder") as beside:
        (beside / "file").write_text(str(1 / 0))
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_an_interrupted_replacement_left_is_cleared_by_the_next(tmp_path: Path):
    (tmp_path / ".folder.replaced").mkdir()
    (tmp_path / "beside").mkdir()
    publish_folder(tmp_path / "beside", tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_text_replaces_text(tmp_path: Path):
    for text in ("one", "two"):
        atomic_write_text(tmp_path / "below" / "file", text)
    assert (tmp_path / "below" / "file").read_text() == "two"
    assert len(list((tmp_path / "below").iterdir())) == 1
