"""The folders that a run writes to: locked for one run at a time, cleared of leftovers, and checked to be writable."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

from megatron_dwm.atomic_write import remove_leftovers
from megatron_dwm.config.checkpoint import TRACKER, CheckpointConfig
from megatron_dwm.config.checkpoint_args import read_arguments
from megatron_dwm.config.data import DataConfig
from megatron_dwm.config.logging import LoggingConfig
from megatron_dwm.errors import UserError, reported_write_failure
from megatron_dwm.training.checkpoint_folders import (
    NON_PERSISTENT,
    checkpoints_in,
    delete_retired,
    track_first_checkpoint,
)
from megatron_dwm.training.folder_lock import FolderLock, visible_holder

logger = logging.getLogger(__name__)


class SaveFolder:
    """The ``--save`` folder, which no other run writes to while this process lives (``folder_lock.py``)."""

    def __init__(self, folder: Path, non_persistent: Path | None = None) -> None:
        """Lock an existing folder, and remove what killed runs have left in it.

        Args:
            non_persistent: the folder of ``--non-persistent-global-ckpt-dir``, which is locked as well.

        Raises:
            UserError: a folder cannot be written to, is in a checkpoint, or another run holds it.
        """
        self.folder, self._non_persistent = folder, non_persistent
        self._folders = {"--save": folder}
        if non_persistent is not None:
            self._folders["--non-persistent-global-ckpt-dir"] = non_persistent
        self._held: dict[str, FolderLock] = {}
        for above in (folder.resolve(), *folder.resolve().parents):
            if above.name.startswith("iter_") and (above / "metadata.json").is_file():
                raise UserError(
                    f"--save {folder}: is in the checkpoint {above}, which may be deleted; give another folder"
                )
        check_writable(self._folders)
        for name in ("weighter", NON_PERSISTENT):  # else the first save would be too late to find out
            check_writable({"--save": folder / name})
        for flag, path in self._folders.items():
            if path.is_dir():
                self._lock(flag, path)
        if "--save" in self._held:
            with reported_write_failure("--save", str(folder)):
                self._clean()

    def create(self) -> None:
        """Create the folders that do not exist yet, and lock them.

        Raises:
            UserError: one cannot be created, or another run has locked it first.
        """
        for flag, path in self._folders.items():
            if flag not in self._held:
                self._lock(flag, path)

    @property
    def holders(self) -> dict[str, str]:
        """Who holds each folder."""
        return {_holder_of(flag, lock.folder): lock.holder for flag, lock in self._held.items()}

    def warn_of_other_run(self) -> None:
        """Warn that this run, which starts from scratch, will replace the checkpoints of another one."""
        if found := checkpoints_in(self.folder):
            logger.warning(
                f"--save {self.folder} holds checkpoints up to {found[-1].name}, which this run replaces as it starts "
                "from scratch; give --load to continue from them, or give another folder"
            )

    def close(self) -> None:
        """Release the folders."""
        while self._held:
            self._held.popitem()[1].close()

    def _lock(self, flag: str, path: Path) -> None:
        with reported_write_failure(flag, str(path)):
            path.mkdir(parents=True, exist_ok=True)
            self._held[flag] = FolderLock(flag, path)

    def _clean(self) -> None:
        """Remove half-written folders and files and checkpoints that were to be deleted; name a first checkpoint."""
        non_persistent = self._non_persistent or self.folder / NON_PERSISTENT
        for folder in (self.folder, non_persistent, self.folder / "weighter"):
            for leftover in remove_leftovers(folder):
                logger.info(f" > removed a leftover of an interrupted run: {leftover}")
        for folder in (self.folder, non_persistent):
            if first := track_first_checkpoint(folder):
                logger.info(f" > {TRACKER} now names the checkpoint of an interrupted run: {first}")
            delete_retired(folder)


def visible_holders(flags: CheckpointConfig) -> dict[str, str]:
    """Return :attr:`SaveFolder.holders` as a rank that does not hold the folders sees them.

    If it sees another holder than the first rank, or none, its part of a checkpoint would be missing in the first
    rank's folder.
    """
    interval, non_persistent = flags.non_persistent_save_interval, flags.non_persistent_global_ckpt_dir
    paths = {"--save": flags.save, "--non-persistent-global-ckpt-dir": non_persistent if interval else None}
    return {_holder_of(flag, Path(path)): visible_holder(Path(path)) for flag, path in paths.items() if path}


def _holder_of(flag: str, folder: Path) -> str:
    return f"the run that holds {flag} {folder}"


def check_owner(flags: CheckpointConfig) -> None:
    """Check that ``--non-persistent-global-ckpt-dir`` holds no other run's checkpoints.

    A run deletes all but the newest two there and loads the newest, so each run needs a folder of its own.

    Raises:
        UserError: the newest checkpoint there belongs to another run.
    """
    if flags.non_persistent_global_ckpt_dir is None or flags.non_persistent_ckpt_type is None:
        return
    folder = Path(flags.non_persistent_global_ckpt_dir)
    folders = [path for path in (flags.save, flags.load) if path is not None]
    for checkpoint in checkpoints_in(folder)[-1:]:
        owner = read_arguments(checkpoint).get("save")
        if owner in folders or Path(str(owner)).resolve() in [Path(path).resolve() for path in folders]:
            continue
        raise UserError(
            f"--non-persistent-global-ckpt-dir {folder}: {checkpoint.name} belongs to a run with --save {owner}, "
            "which this one would delete; give another folder"
        )


def output_folders(checkpoint: CheckpointConfig, data: DataConfig, logging_flags: LoggingConfig) -> dict[str, Path]:
    """Return the folders that a run writes to, by the flag that names each."""
    paths = {
        "--data-cache-path": data.data_cache_path,
        "--tensorboard-dir": logging_flags.tensorboard_dir,
        "--metrics-jsonl": logging_flags.metrics_jsonl and str(Path(logging_flags.metrics_jsonl).parent),
        "--wandb-save-dir": logging_flags.wandb_project and logging_flags.wandb_save_dir,
        "--non-persistent-global-ckpt-dir": checkpoint.non_persistent_global_ckpt_dir,
        "--save": checkpoint.save,
    }
    return {flag: Path(path) for flag, path in paths.items() if path}


def check_writable(paths: Mapping[str, Path]) -> None:
    """Check that folders are writable, or for new ones their first existing parent; leave no trace.

    Args:
        paths: folders by the flag that names them.

    Raises:
        UserError: one is not writable.
    """
    for flag, path in paths.items():
        existing = path
        try:
            while not existing.exists() and existing != existing.parent:
                if existing.is_symlink():
                    raise UserError(
                        f"{flag} {path}: {existing} is a link that leads nowhere; remove it, or give another path"
                    )
                existing = existing.parent
        except OSError as error:  # a name that is too long
            raise UserError(f"{flag} {path}: {error.strerror}; give another path") from None
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            where = "" if existing == path else f" in {existing}"
            raise UserError(f"{flag} {path}: cannot be written{where} ({error.strerror}); give another path") from None
