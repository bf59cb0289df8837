"""Children of a killed rank end at once; children of a thread outlive the thread."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection

from megatron_dwm.runtime.child_processes import end_children_with_this_process

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
