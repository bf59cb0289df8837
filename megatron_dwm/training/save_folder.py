"""The folders that a run writes to: held by one run at a time, cleared of leftovers, and known to be writable."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TextIO

from megatron_dwm.atomic_write import remove_leftovers
from megatron_dwm.errors import UserError
from megatron_dwm.training.checkpoint_folders import NON_PERSISTENT, checkpoints_in, delete_retired

logger = logging.getLogger(__name__)

LOCK = ".lock"


class SaveFolder:
    """The ``--save`` folder, which no other run writes to while this process lives.

    The lock is the operating system's on the file ``.lock`` (POSIX ``fcntl``, which NFS passes on to its server): it
    ends with the process that holds it, however that ends, and children do not inherit it. What the file says is for
    messages.
    """

    def __init__(self, folder: Path) -> None:
        """Take a folder that is there already, and clear it of what killed runs have left in it.

        Raises:
            UserError: the folder cannot be written to, or another run holds it.
        """
        self.folder = folder
        self._file: TextIO | None = None
        check_writable({"--save": folder})
        if folder.is_dir():
            self._lock()
            self._clean()

    def create(self) -> None:
        """Create the folder if it is not there yet, and take it.

        Raises:
            UserError: another run has come first.
        """
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock()

    def warn_of_other_run(self) -> None:
        """Warn that this run, which starts anew, will replace the checkpoints of another one."""
        if found := checkpoints_in(self.folder):
            logger.warning(
                f"--save {self.folder} holds checkpoints up to {found[-1].name}, which this run replaces as it starts "
                "anew; give --load to go on from them, or another folder"
            )

    def close(self) -> None:
        """Let another run have the folder."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None

    def _lock(self) -> None:
        # Opened once for the life of the process: closing any handle of this file would end the lock.
        file = (self.folder / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                owner = _owner(file)
                file.close()
                raise UserError(
                    f"--save {self.folder}: another run writes there ({owner}); end it, or give another folder"
                ) from None
            logger.warning(
                f"--save {self.folder}: its file system knows no locks ({error.strerror}); see to it that no other run "
                "writes there"
            )
        file.truncate(0)
        owner_now = {"host": socket.gethostname(), "pid": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        file.write(json.dumps(owner_now) + "\n")
        file.flush()
        self._file = file

    def _clean(self) -> None:
        """Remove half-written folders and files, and checkpoints that were to be deleted."""
        for folder in (self.folder, self.folder / NON_PERSISTENT, self.folder / "weighter"):
            for leftover in remove_leftovers(folder):
                logger.info(f" > cleared what an interrupted run left: {leftover}")
        delete_retired(self.folder)


def _owner(file: TextIO) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        file.seek(0)
        owner = json.loads(file.readline())
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    return "its process is not known"


def check_writable(paths: Mapping[str, Path]) -> None:
    """Check that folders can be written to, those that are not there yet by the first parent that is; leaves no trace.

    Args:
        paths: folders by the flag that names them.

    Raises:
        UserError: one cannot.
    """
    for flag, path in paths.items():
        existing = path
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            where = "" if existing == path else f" in {existing}"
            raise UserError(f"{flag} {path}: cannot be written{where} ({error.strerror}); give another path") from None
