"""Long work on a dataset: finished segments are kept next to it until all of it is complete.

The same command, started again after an interruption, continues after the last finished segment.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_dwm.atomic_write import atomic_write_text, remove, sync
from megatron_dwm.corpora.storage import absolute, is_url, stamp_of
from megatron_dwm.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Numbers of records read up to the end of a segment."""

    records: int = 0
    documents: int = 0
    skipped: int = 0
    first_skipped: str = ""
    """Place of the first skipped record, and why it was skipped."""


class UnfinishedWork:
    """The segments of a dataset, each in a folder, in the order of the documents."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.segments: list[Path] = []
        self.progress = Progress()

    def next_segment(self) -> Path:
        """Return an empty folder for the next segment."""
        folder = self.folder / f"{len(self.segments):06d}"
        remove(folder)
        folder.mkdir()
        return folder

    def keep(self, segment: Path, progress: Progress) -> None:
        """Keep a segment whose files are complete."""
        for path in segment.iterdir():
            sync(path)
        atomic_write_text(segment / _DONE, json.dumps(asdict(progress)) + "\n")
        self.segments.append(segment)
        self.progress = progress

    def resume(self) -> None:
        """Find the segments that an earlier call has finished."""
        while (done := self.folder / f"{len(self.segments):06d}" / _DONE).is_file():
            try:
                self.progress = Progress(**json.loads(done.read_text(encoding="utf-8")))
            except (OSError, RecursionError, TypeError, ValueError):
                logger.warning(f"{done}: damaged; the work after it is done again")
                remove(done.parent)
                return
            self.segments.append(done.parent)


_DONE = "done.json"
_JOB = "job.json"
LOCK = "lock"


@contextmanager
def unfinished_work(folder: Path, job: str | None, unit: str = "documents") -> Iterator[UnfinishedWork]:
    """Yield the work in ``folder``, which is removed when the block ends, or raises before a segment was finished.

    Args:
        folder: a folder that only this work uses.
        job: what the work depends on; None for work that cannot be continued. Another job's segments are removed.
        unit: what :attr:`Progress.records` counts.

    Raises:
        UserError: another process does this work.
    """
    lock = lock_folder(folder)
    try:
        work, written = UnfinishedWork(folder), folder / _JOB
        if job is not None and written.is_file() and written.read_bytes() == job.encode():
            work.resume()
        else:
            for path in folder.iterdir():
                if path.name != LOCK:
                    remove(path)
            if job is not None:
                atomic_write_text(written, job)
        if work.segments:
            logger.info(f"Continuing after {work.progress.records:,} {unit} that are in {folder}.")
        try:
            yield work
        except BaseException:
            if not work.segments or job is None:
                remove(folder)
            else:
                logger.info(f"{work.progress.records:,} {unit} are kept in {folder} for the same command.")
            raise
        remove(written)  # first, so that a call after a kill during the next line does not continue with what is left
        remove(folder)
    finally:
        os.close(lock)


def lock_folder(folder: Path) -> int:
    """Make a folder, and lock it for this process until the descriptor that is returned is closed.

    Raises:
        UserError: another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / LOCK, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK)
    try:
        # A lock of this process alone: workers that outlive it for a moment do not hold it.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(lock)
        raise UserError(f"{folder}: another process is writing there; wait until it has finished") from None
    except OSError as error:
        logger.warning(
            f"{folder}: its file system has no locks ({error.strerror}); run no other command with this output"
        )
    return lock


def file_stamps(paths: list[str]) -> list[tuple[str, int, str]] | None:
    """Return path, size and last change of each file; None if one is neither a regular file nor behind a URL."""
    if not all(is_url(path) or os.path.isfile(path) for path in paths):
        return None
    return [(absolute(path), *stamp_of(path)) for path in paths]


def files_below(paths: Iterable[str]) -> list[str]:
    """Return those of the paths that are files, and the files in those that are folders, such as a tokenizer's."""
    places = [[path, *sorted(map(str, Path(path).glob("*")))] for path in paths]
    return [path for found in places for path in found if os.path.isfile(path)]
