"""A lock on a folder, which one process holds at a time, on one machine or on many that share a file system.

The lock is the operating system's on the file ``.lock`` (POSIX ``fcntl``): it ends with the process that holds it,
however it ends, and children do not inherit it. NFS forwards it to its server. Some mounts do not: Lustre without
``flock`` refuses it, and NFS with ``nolock`` or ``local_lock`` silently keeps it on one machine. For these cases
the holder regularly touches a second file, its heartbeat, and a folder whose heartbeat moves is not taken. On a
network file system a process that got the lock also waits a moment, and checks that no other process got it too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import socket
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TextIO

from megatron_dwm.errors import UserError

logger = logging.getLogger(__name__)

LOCK = ".lock"
HEARTBEAT = ".lock.heartbeat"
HEARTBEAT_SECONDS = 10.0
LEASE_SECONDS = 60.0
"""A holder whose heartbeat has not moved for this long is considered killed: it has missed five beats."""
VISIBLE_SECONDS = 60.0
"""How long a shared file system may take to show a new file to other machines: NFS's default ``acdirmax``."""
SETTLE_SECONDS = 2.0
"""How long a process waits, if others may have the lock too, before it reads the name of the holder: the last to write
its name holds the folder."""
_NETWORK = re.compile("nfs|lustre|gpfs|beegfs|ceph|cifs|smb|gluster|9p|fuse")
"""Beginnings of the names of file systems that several machines may share."""


class FolderLock:
    """A lock on a folder, held by this process until it ends or closes the lock."""

    def __init__(self, flag: str, folder: Path) -> None:
        """Lock an existing folder.

        Args:
            flag: the flag that names the folder, for messages.

        Raises:
            UserError: another process holds it, or its lock is not a file.
        """
        self.flag, self.folder = flag, folder
        self._closed = threading.Event()
        # Opened once for the life of the process: closing any handle of this file would end the lock.
        try:
            self._file = (folder / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            reason = error.strerror or error  # a named pipe's has none
            raise UserError(f"{flag} {folder / LOCK}: cannot be opened ({reason}); remove it") from None
        is_locked = self._lock()
        holder = _recorded_holder(self._file)
        is_elsewhere = holder is not None and holder.get("host") != socket.gethostname()
        if (holder is not None and not is_locked) or is_elsewhere:
            self._wait_for_end_of(holder)
        is_local = _NETWORK.match(file_system(folder)) is None
        self._record_holder(is_certain=is_locked and is_local and not is_elsewhere)
        threading.Thread(target=self._beat, name="folder-lock", daemon=True).start()

    def close(self) -> None:
        """Release the folder."""
        self._closed.set()
        with contextlib.suppress(OSError):
            (self.folder / HEARTBEAT).unlink(missing_ok=True)
            self._file.truncate(0)
        self._file.close()

    def _lock(self) -> bool:
        """Take the operating system's lock; return whether the file system supports locks."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self._refuse(_recorded_holder(self._file))
            logger.warning(
                f"{self.flag} {self.folder}: its file system has no locks ({error.strerror}); whether another run "
                f"writes there shows by {HEARTBEAT}, which a run touches every {HEARTBEAT_SECONDS:.0f} s"
            )
            return False
        return True

    def _refuse(self, holder: dict[str, Any] | None) -> NoReturn:
        self._file.close()
        raise UserError(
            f"{self.flag} {self.folder}: another run is writing there ({_description(holder)}); end it, or give "
            "another folder"
        )

    def _wait_for_end_of(self, holder: dict[str, Any] | None) -> None:
        """Wait until the heartbeat of a holder that the lock does not reveal has not moved for long enough.

        Raises:
            UserError: the heartbeat moves.
        """
        before = self._heartbeat()
        deadline = time.monotonic() + LEASE_SECONDS - self._age_of(before)
        if before is None or time.monotonic() > deadline:
            return
        logger.info(
            f" > {self.flag} {self.folder} was held by {_description(holder)}: waiting up to {LEASE_SECONDS:.0f} s for "
            "a sign of life"
        )
        while time.monotonic() < deadline:
            time.sleep(HEARTBEAT_SECONDS / 10)
            if self._heartbeat() != before:
                self._refuse(holder)

    def _record_holder(self, *, is_certain: bool) -> None:
        """Record who holds the folder; without a lock, check that no other process has done so at the same time.

        Raises:
            UserError: another one has.
        """
        since = f"{datetime.now():%Y-%m-%d %H:%M:%S.%f}"
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        self._file.truncate(0)
        self._file.write(json.dumps(mine) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # NFS sends it to its server when the file is closed, or now
        self.holder = _description(mine)
        """Who holds the folder, for messages."""
        (self.folder / HEARTBEAT).touch()
        if not is_certain:
            time.sleep(SETTLE_SECONDS)
            # Opened again, so that NFS asks its server, and not closed, which would end the lock.
            self._seen = (self.folder / LOCK).open(encoding="utf-8")
            holder = _recorded_holder(self._seen)
            if holder != mine:
                self._refuse(holder)

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk, or a folder that was removed, is found when saving
                os.utime(self.folder / HEARTBEAT)

    def _heartbeat(self) -> int | None:
        """Return the time of the last heartbeat, by the clock of the file system; None if there is none."""
        try:
            # Opened again, so that NFS asks its server.
            descriptor = os.open(self.folder / HEARTBEAT, os.O_RDONLY)
        except OSError:
            return None
        try:
            return os.fstat(descriptor).st_mtime_ns
        finally:
            os.close(descriptor)

    def _age_of(self, heartbeat: int | None) -> float:
        """Return the seconds since the last heartbeat, by the same clock."""
        with tempfile.TemporaryFile(dir=self.folder) as now:
            return 0.0 if heartbeat is None else max(0.0, (os.fstat(now.fileno()).st_mtime_ns - heartbeat) / 1e9)


def file_system(folder: Path) -> str:
    """Return the kind of file system that a folder is on, such as ``ext4`` or ``nfs4``; empty if it is not known."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for mount in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if mount.split()[2] == number:
                return mount.partition(" - ")[2].split()[0]
    return ""


def heartbeat_age(folder: Path) -> float | None:
    """Return the seconds since the heartbeat of the process that holds ``folder``, by this machine's clock.

    None if no process holds it. After more than :data:`LEASE_SECONDS` its process is considered killed.
    """
    try:
        return time.time() - (folder / HEARTBEAT).stat().st_mtime
    except OSError:
        return None


def visible_holder(folder: Path) -> str:
    """Return who holds ``folder``, as another process than the holder sees it; waits until a process does."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        with contextlib.suppress(OSError), (folder / LOCK).open(encoding="utf-8") as file:
            return _description(_recorded_holder(file))
        if time.monotonic() > deadline:
            return "nobody"
        time.sleep(0.1)


def _recorded_holder(file: TextIO) -> dict[str, Any] | None:
    """Return the holder that the lock's file records; None if it records none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        file.seek(0)
        holder = json.loads(file.readline())
        return holder if isinstance(holder, dict) else None
    return None


def _description(holder: dict[str, Any] | None) -> str:
    if holder is None or not {"pid", "host", "since"} <= holder.keys():
        return "its process is not known"
    return f"process {holder['pid']} on {holder['host']} since {str(holder['since'])[:19]}"
