"""One run a folder: on one machine, on machines whose locks do not reach each other, and after a kill."""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_dwm.errors import UserError
from megatron_dwm.training import folder_lock
from megatron_dwm.training.folder_lock import HEARTBEAT, LOCK, file_system
from megatron_dwm.training.save_folder import SaveFolder

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
    with pytest.raises(UserError, match=rf"another run is writing there \(process {owner.pid} on "):
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
    with pytest.raises(UserError, match="another run is writing there"):
        late.create()
    process.kill()
    process.join()


LEASE = 2.0
"""Seconds, in place of a minute; more than a busy machine keeps a process waiting."""


def of_another_host(patch: pytest.MonkeyPatch) -> None:
    """A machine whose locks stay on it, as with NFS's ``nolock``; this one is of another name."""
    patch.setattr(fcntl, "lockf", lambda *arguments: None)
    patch.setattr(socket, "gethostname", lambda: f"host{os.getpid()}")


def without_locks(patch: pytest.MonkeyPatch) -> None:
    """A file system that knows no locks, as Lustre without ``flock``."""

    def refuse(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    patch.setattr(fcntl, "lockf", refuse)


@pytest.mark.parametrize("mount", [of_another_host, without_locks])
def test_where_no_lock_decides_the_heartbeat_of_the_holder_does(
    mount: Callable[[pytest.MonkeyPatch], None],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(folder_lock, "LEASE_SECONDS", LEASE)
    monkeypatch.setattr(folder_lock, "HEARTBEAT_SECONDS", LEASE / 3)
    monkeypatch.setattr(folder_lock, "SETTLE_SECONDS", LEASE / 3)
    mount(monkeypatch)
    save, said = tmp_path / "save", "its file system has no locks (No locks available)"
    owner = request.getfixturevalue("owner")
    with pytest.raises(UserError, match=rf"another run is writing there \(process {owner.pid} on "):
        SaveFolder(save)
    assert (said in caplog.text) == (mount is without_locks)

    owner.kill()
    owner.join()
    started = time.monotonic()
    SaveFolder(save).close()  # the heartbeat stands still
    assert time.monotonic() - started < 3 * LEASE
    assert f"was held by process {owner.pid} on " in caplog.text
    assert (save / LOCK).read_text() == "" and not (save / HEARTBEAT).exists()


def test_a_holder_that_has_been_dead_for_long_is_not_waited_for(
    owner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    owner.kill()
    owner.join()
    os.utime(tmp_path / "save" / HEARTBEAT, (time.time() - 3600,) * 2)
    monkeypatch.setattr(folder_lock, "SETTLE_SECONDS", 0.0)
    of_another_host(monkeypatch)
    started = time.monotonic()
    SaveFolder(tmp_path / "save").close()
    assert time.monotonic() - started < folder_lock.LEASE_SECONDS / 2


def test_kinds_of_file_systems_are_known():
    assert (file_system(Path("/proc")), file_system(Path("/sys"))) == ("proc", "sysfs")


@pytest.mark.parametrize("mount", [of_another_host, without_locks])
def test_of_two_that_come_at_once_one_gets_the_folder(
    mount: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each writes its name, and looks after a while whose name is there."""
    monkeypatch.setattr(folder_lock, "HEARTBEAT_SECONDS", 0.3)
    monkeypatch.setattr(folder_lock, "LEASE_SECONDS", 5.0)
    monkeypatch.setattr(folder_lock, "SETTLE_SECONDS", 1.0)
    monkeypatch.setattr(folder_lock, "file_system", lambda folder: "nfs4")
    mount(monkeypatch)
    outcomes, gate = FORK.Queue(), FORK.Barrier(3)

    def come() -> None:
        gate.wait()
        try:
            SaveFolder(tmp_path)
        except UserError as error:
            outcomes.put(str(error))
        else:
            outcomes.put("held")
            signal.pause()

    processes = [FORK.Process(target=come) for _ in range(3)]
    for process in processes:
        process.start()
    found = sorted(outcomes.get(timeout=60) for _ in processes)
    for process in processes:
        process.kill()
        process.join()
    assert found.count("held") == 1 and sum("another run is writing there (process" in text for text in found) == 2, (
        found
    )
