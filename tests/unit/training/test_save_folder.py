"""One run a folder; what a killed run left is cleared; what cannot be written is named before anything is."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_dwm.errors import UserError
from megatron_dwm.training import save_folder
from megatron_dwm.training.save_folder import LOCK, SaveFolder, check_writable

FORK = multiprocessing.get_context("fork")


def hold(folder: Path, taken: Any) -> None:
    held = SaveFolder(folder)
    held.create()
    taken.set()
    signal.pause()


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Any]:
    """Another process that holds ``tmp_path / "save"``."""
    taken = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path / "save", taken))
    process.start()
    taken.wait()
    yield process
    process.kill()
    process.join()


def test_a_folder_that_another_process_holds_is_refused_by_name(owner: Any, tmp_path: Path):
    with pytest.raises(UserError, match=rf"another run writes there \(process {owner.pid} on "):
        SaveFolder(tmp_path / "save")


def test_a_killed_owner_holds_nothing(owner: Any, tmp_path: Path):
    owner.kill()
    owner.join()
    held = SaveFolder(tmp_path / "save")
    assert json.loads((tmp_path / "save" / LOCK).read_text())["pid"] == os.getpid()
    held.close()


def test_children_of_a_killed_owner_hold_nothing(tmp_path: Path):
    """Loaders and checkpoint writers are forks, and may outlive a rank that is killed."""
    taken, child_pid = FORK.Event(), FORK.Value("i", 0)

    def hold_with_a_child() -> None:
        held = SaveFolder(tmp_path)
        child = os.fork()
        if child == 0:
            signal.pause()
        child_pid.value = child
        hold_open.append(held)
        taken.set()
        signal.pause()

    hold_open: list[SaveFolder] = []
    process = FORK.Process(target=hold_with_a_child)
    process.start()
    taken.wait()
    process.kill()
    process.join()
    try:
        os.kill(child_pid.value, 0)
        SaveFolder(tmp_path).close()
    finally:
        os.kill(child_pid.value, signal.SIGKILL)


def test_two_runs_that_find_no_folder_do_not_both_get_it(tmp_path: Path):
    late = SaveFolder(tmp_path / "save")
    assert list(tmp_path.iterdir()) == []
    taken = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path / "save", taken))
    process.start()
    taken.wait()
    with pytest.raises(UserError, match="another run writes there"):
        late.create()
    process.kill()
    process.join()


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    said: list[str] = []
    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(save_folder.logger, "warning", said.append)
    SaveFolder(tmp_path).close()
    assert len(said) == 1 and "its file system knows no locks (No locks available)" in said[0]


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path):
    for name in ("iter_0000004", "iter_0000008", ".iter_0000012.partial", "weighter/.iter_0000008.tmp77", "weighter/x"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").touch()
    (tmp_path / "non_persistent").mkdir()
    (tmp_path / "non_persistent" / ".iter_0000009.partial").mkdir()
    (tmp_path / ".iter_0000004.retired").touch()  # killed after the tracker named 8
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("8")
    SaveFolder(tmp_path).close()
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_dir())
    assert found == ["iter_0000008", "non_persistent", "weighter", "weighter/x"]
    assert sorted(path.name for path in tmp_path.glob(".*")) == [LOCK]


def test_a_checkpoint_that_was_to_be_deleted_stays_while_the_tracker_names_it(tmp_path: Path):
    (tmp_path / "iter_0000004").mkdir()
    (tmp_path / ".iter_0000004.retired").touch()  # killed before the tracker named the next
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    SaveFolder(tmp_path).close()
    assert (tmp_path / "iter_0000004").is_dir() and not (tmp_path / ".iter_0000004.retired").exists()


def test_what_cannot_be_written_is_named_and_nothing_is_left(tmp_path: Path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=rf"--tensorboard-dir {path}: cannot be written.* \(Not a directory\)"):
            check_writable({"--tensorboard-dir": path})
    for path in (Path("/proc"), Path("/proc/below/it")):  # a file system that takes no files
        with pytest.raises(UserError, match=f"--save {path}: cannot be written"):
            check_writable({"--save": path})
    check_writable({"--save": tmp_path / "below" / "it"})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
