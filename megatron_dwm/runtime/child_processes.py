"""Child processes that end with their rank, and the folder of the sockets through which they are reached.

A forked child inherits the rank's connections. If it outlived a killed rank, the connections would stay open, and the
other ranks would wait for the rank until the timeout of their collective.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import tempfile
import threading

from megatron_dwm.errors import UserError

_LONGEST_TEMPORARY_PATH = 107 - len("/pymp-12345678/listener-12345678")
"""Bytes: Linux's limit for the path of a socket, less what Python's multiprocessing adds."""
_SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when the thread that has started it ends.

    Args:
        parent: the parent's process ID.
    """
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


@functools.cache  # once: handlers cannot be removed, and children inherit them
def end_children_with_this_process() -> None:
    """Let the kernel kill the children that the main thread forks from now on, when this process ends in any way."""
    forking = threading.local()  # of the forking thread, which is the child's only one

    def note_parent() -> None:
        # A child of another thread would end with that thread.
        forking.parent = os.getpid() if threading.get_native_id() == os.getpid() else None

    def follow_parent() -> None:
        if forking.parent is not None:
            end_with_parent(forking.parent)

    os.register_at_fork(before=note_parent, after_in_child=follow_parent)


def require_temporary_folder() -> None:
    """Check that processes can be reached through sockets in the folder of temporary files.

    Raises:
        UserError: there is no such folder, or its path is too long for a socket's.
    """
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(f"TMPDIR: {error.strerror}; set it to a folder that can be written to") from None
    if (length := len(os.fsencode(folder))) > _LONGEST_TEMPORARY_PATH:
        raise UserError(
            f"TMPDIR {folder}: its {length} bytes are too many for the path of a socket; set it to a path of at most "
            f"{_LONGEST_TEMPORARY_PATH}, such as /tmp"
        )
