"""What is written is whole, and what was there is lost to nothing but its successor."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_dwm.atomic_write import (
    atomic_files,
    atomic_folder,
    atomic_write_text,
    delete_folder,
    publish_folder,
    remove_leftovers,
)
from tests.unit.obstacles import OBSTACLES


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask() -> Iterator[int]:
    """A umask that lets the group read, whatever the caller's is."""
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_a_folder_replaces_the_one_that_was_there(tmp_path: Path):
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "file").write_text(content)
            (temporary / content).mkdir()
    assert names(tmp_path / "folder") == ["file", "second"]
    assert names(tmp_path) == ["folder"]


def test_a_block_that_fails_leaves_the_old_folder(tmp_path: Path):
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_text(str(1 / 0))
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_what_an_interrupted_replacement_left_is_cleared_by_the_next(tmp_path: Path):
    (tmp_path / ".folder.replaced").mkdir()
    (tmp_path / "beside").mkdir()
    publish_folder(tmp_path / "beside", tmp_path / "folder")
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("kind", OBSTACLES)
def test_whatever_is_under_a_name_is_replaced_or_removed(kind: str, tmp_path: Path):
    for name in ("folder", ".folder.replaced", ".folder.deleted", ".other.replaced", ".other.tmp5"):
        OBSTACLES[kind](tmp_path / name)
    (tmp_path / "beside").mkdir()
    publish_folder(tmp_path / "beside", tmp_path / "folder")
    assert not (tmp_path / "folder").is_symlink() and names(tmp_path / "folder") == []
    delete_folder(tmp_path / "folder")
    is_old_content = kind in ("folder", "full folder", "link to a folder")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == (["other"] if is_old_content else [])


def test_files_appear_together_under_their_prefix(tmp_path: Path):
    (tmp_path / "data.idx").write_text("old")
    with atomic_files(tmp_path, "data") as temporary:
        for suffix in (".bin", ".idx"):
            (temporary / suffix).write_text(f"new {suffix}")
        assert (tmp_path / "data.idx").read_text() == "old"
    assert names(tmp_path) == ["data.bin", "data.idx"]
    assert (tmp_path / "data.idx").read_text() == "new .idx"
    with pytest.raises(ZeroDivisionError), atomic_files(tmp_path, "data") as temporary:
        (temporary / ".idx").write_text(str(1 / 0))
    assert names(tmp_path) == ["data.bin", "data.idx"]


def test_what_a_killed_writer_had_not_finished_goes_when_the_same_is_written_again(tmp_path: Path):
    """A killed build of an index may leave gigabytes. What a living process writes is left alone."""
    folder = tmp_path / "folder"

    def write_half(is_files: bool) -> None:
        with atomic_files(tmp_path, "data") if is_files else atomic_folder(folder) as temporary:
            (temporary / "half").touch()
            signal.pause()

    writers = [multiprocessing.get_context("fork").Process(target=write_half, args=(files,)) for files in (True, False)]
    for writer in writers:
        writer.start()
    while len(list(tmp_path.glob(".*/half"))) < 2:
        time.sleep(0.01)
    for is_there in (True, False):
        with atomic_files(tmp_path, "data"), atomic_folder(folder):
            assert len(list(tmp_path.glob(".*/half"))) == (2 if is_there else 0)
        for writer in writers:
            writer.kill()
            writer.join()
    assert names(tmp_path) == ["folder"]


def test_text_replaces_text(tmp_path: Path):
    for text in ("one", "two"):
        atomic_write_text(tmp_path / "below" / "file", text)
    assert (tmp_path / "below" / "file").read_text() == "two"
    assert names(tmp_path / "below") == ["file"]


def test_a_file_that_cannot_be_replaced_leaves_nothing_beside(tmp_path: Path):
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError):
        atomic_write_text(tmp_path / "file", "text")
    assert names(tmp_path) == ["file"]


def _write_folder(path: Path, text: str) -> None:
    with atomic_folder(path) as folder:
        (folder / "file").write_text(text)


@pytest.mark.parametrize("write", [atomic_write_text, _write_folder])
def test_a_device_is_not_replaced(write: Callable[[Path, str], None]):
    main, terminal = os.openpty()  # a device that not even root can replace
    try:
        with pytest.raises(OSError, match="a device, or in the folder of devices"):
            write(Path(os.ttyname(terminal)), "text")
    finally:
        os.close(main)
        os.close(terminal)


def test_permissions_are_those_of_the_umask_not_of_the_library(tmp_path: Path, umask: int):
    """safetensors writes its files for their owner alone."""

    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "file").touch(mode=0o600)
    with atomic_files(tmp_path) as temporary:
        (temporary / "file").touch(mode=0o600)
    assert mode(tmp_path / "folder") == 0o777 & ~umask
    assert mode(tmp_path / "folder" / "file") == mode(tmp_path / "file") == 0o666 & ~umask


def test_an_interrupted_deletion_leaves_nothing_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *arguments, **options: None)
        delete_folder(tmp_path / "folder")
    assert names(tmp_path) == [".folder.deleted"]
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path):
    for name in (".iter_3.tmp123", ".iter_4.partial", ".iter_5.replaced", "iter_5", "iter_6", ".cache", ".tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".tracker.tmp7").touch()
    (tmp_path / ".iter_6.replaced").touch()  # a file, as nobody leaves it
    (tmp_path / ".iter_8.replaced").mkdir()  # its replacement was killed between the two renames
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".cache", ".tmp", "iter_5", "iter_6", "iter_8"]
    assert (tmp_path / "iter_5" / "file").read_text() == "iter_5"
    assert remove_leftovers(tmp_path / "nothing") == []
