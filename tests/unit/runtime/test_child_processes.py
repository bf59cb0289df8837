"""Children of a killed rank end at once; children of a thread outlive the thread; all are reached through sockets."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import time
from multiprocessing.connection import Connection, Listener
from pathlib import Path

import pytest

from megatron_dwm.errors import UserError
from megatron_dwm.runtime.child_processes import end_children_with_this_process, require_temporary_folder

FORK = multiprocessing.get_context("fork")


def start_children(pipe: Connection) -> None:
    """Fork a child, and one from a thread that ends; send both numbers."""
    end_children_with_this_process()
    child, threads_child = FORK.Process(target=time.sleep, args=(60,)), FORK.Process(target=time.sleep, args=(60,))
    child.start()
    thread = threading.Thread(target=threads_child.start)
    thread.start()
    thread.join()
    pipe.send((child.pid, threads_child.pid))
    signal.pause()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:  # a zombie has ended
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def test_children_of_a_killed_process_end_at_once():
    ours, theirs = FORK.Pipe()
    rank = FORK.Process(target=start_children, args=(theirs,))
    rank.start()
    child, threads_child = ours.recv()
    assert is_running(child) and is_running(threads_child)
    rank.kill()
    rank.join()
    deadline = time.monotonic() + 5
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        assert not is_running(child) and is_running(threads_child)
    finally:
        os.kill(threads_child, signal.SIGKILL)


@pytest.mark.parametrize("is_short", [True, False])
def test_a_temporary_folder_is_refused_whose_path_is_too_long_for_a_socket(
    is_short: bool, monkeypatch: pytest.MonkeyPatch
):
    """Where checkpoints are written and data are loaded, Python makes sockets there."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        folder = Path(short, "x" * ((75 if is_short else 76) - len(short) - 1))
        socket = folder / "pymp-12345678" / "listener-12345678"  # as multiprocessing names it
        socket.parent.mkdir(parents=True)
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        if is_short:
            require_temporary_folder()
            Listener(str(socket)).close()
            return
        with pytest.raises(UserError, match=f"TMPDIR {folder}: its 76 bytes are too many .* at most 75, such as /tmp"):
            require_temporary_folder()
        with pytest.raises(OSError, match="AF_UNIX path too long"):
            Listener(str(socket))


def test_a_machine_without_a_temporary_folder_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    with pytest.raises(UserError, match=r"TMPDIR: No usable temporary directory found in .*; set it to a folder that"):
        require_temporary_folder()
