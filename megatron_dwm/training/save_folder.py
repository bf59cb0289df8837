"""The folders that a run writes to: locked for one run at a time, cleared of leftovers, and checked to be writable."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

from megatron_dwm.atomic_write import remove_leftovers
from megatron_dwm.errors import UserError
from megatron_dwm.training.checkpoint_folders import NON_PERSISTENT, checkpoints_in, delete_retired
from megatron_dwm.training.folder_lock import FolderLock

logger = logging.getLogger(__name__)


class SaveFolder:
    """The ``--save`` folder, which no other run writes to while this process lives (``folder_lock.py``)."""

    def __init__(self, folder: Path) -> None:
        """Lock an existing folder, and remove what killed runs have left in it.

        Raises:
            UserError: the folder cannot be written to, or another run holds it.
        """
        self.folder = folder
        self._held: FolderLock | None = None
        check_writable({"--save": folder})
        if folder.is_dir():
            self._held = FolderLock("--save", folder)
            self._clean()

    def create(self) -> None:
        """Create the folder if it does not exist yet, and lock it.

        Raises:
            UserError: another run has locked it first.
        """
        if self._held is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held = FolderLock("--save", self.folder)

    def warn_of_other_run(self) -> None:
        """Warn that this run, which starts from scratch, will replace the checkpoints of another one."""
        if found := checkpoints_in(self.folder):
            logger.warning(
                f"--save {self.folder} holds checkpoints up to {found[-1].name}, which this run replaces as it starts "
                "anew; give --load to go on from them, or another folder"
            )

    def close(self) -> None:
        """Release the folder."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def _clean(self) -> None:
        """Remove half-written folders and files, and checkpoints that were to be deleted."""
        for folder in (self.folder, self.folder / NON_PERSISTENT, self.folder / "weighter"):
            for leftover in remove_leftovers(folder):
                logger.info(f" > removed what an interrupted run had left:  {leftover}")
        delete_retired(self.folder)


def check_writable(paths: Mapping[str, Path]) -> None:
    """Check that folders are writable, or for new ones their first existing parent; leave no trace.

    Args:
        paths: folders by the flag that names them.

    Raises:
        UserError: one is not writable.
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
