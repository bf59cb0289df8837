"""Writers of a run's records besides the log: JSON lines, TensorBoard and Weights & Biases."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TextIO

from megatron_dwm.atomic_write import atomic_files
from megatron_dwm.config.logging import LoggingConfig
from megatron_dwm.errors import UserError, shortened
from megatron_dwm.extras import require_packages
from megatron_dwm.json_lines import parse_object
from megatron_dwm.runtime.logging import EVERY_RANK

logger = logging.getLogger(__name__)


class JsonLinesWriter:
    """Writer of records to a file, one JSON object per line, each flushed when written.

    A resumed run removes the records that it will write again. A run that starts from scratch renames another run's
    records to a name with their time. A log never stops training: lines that are not records are moved to
    ``<name>.damaged``, a file that is removed meanwhile is made again, and a record that cannot be written is lost;
    there is one warning of each.
    """

    def __init__(
        self, path: Path, resumed_at: int, is_repeated: Callable[[Mapping[str, Any]], bool] = lambda record: False
    ) -> None:
        """
        Args:
            path: the file.
            resumed_at: the iteration from which the run continues, 0 for a new run.
            is_repeated: whether a record of that iteration will be written again, as those of later ones will.

        Raises:
            UserError: the file cannot be written.
        """
        self._path, self._has_failed = path, False
        if path.is_fifo():  # opening it would wait for a reader
            raise UserError(f"--metrics-jsonl {path} is a named pipe; give another path")
        try:
            if path.is_file():
                self._open_locked().close()  # before another run's file is replaced
            if path.is_file() and resumed_at > 0:
                _keep_records_until(path, resumed_at, is_repeated)
            elif path.is_file() and path.stat().st_size > 0:  # else that run ended before its first record
                written = datetime.fromtimestamp(path.stat().st_mtime)
                path.rename(path.with_name(f"{path.stem}.until-{written:%Y%m%d-%H%M%S-%f}{path.suffix}"))
            self._file = self._open_locked()
        except OSError as error:
            place = "" if error.filename in (None, str(path)) else f"{error.filename}: "
            raise UserError(
                f"--metrics-jsonl {path}: cannot be written ({place}{error.strerror}); give another path"
            ) from None

    def _open(self) -> TextIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return open_to_append(self._path)

    def _open_locked(self) -> TextIO:
        """Open the file, and lock it until it is closed.

        Raises:
            UserError: another run has locked it.
        """
        file = self._open()
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise UserError(
                f"--metrics-jsonl {self._path}: another run is writing there; end it, or give another path"
            ) from None
        except OSError:  # a file system without locks
            pass
        return file

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; numbers that are not finite, which JSON does not support, become null."""
        try:
            if not self._path.exists():
                logger.warning(f"{self._path} was removed; earlier records are lost", extra=EVERY_RANK)
                self._file = self._open()
            self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            if not self._has_failed:
                reason = f"cannot be written ({error.strerror}); records are lost"
                logger.warning(f"{self._path}: {reason}", extra=EVERY_RANK)
            self._has_failed = True

    def close(self) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError:  # the buffer could not be written; there has been a warning
            self._has_failed = True


def open_to_append(path: Path) -> TextIO:
    """Open a file of text to append to it; a named pipe that nobody reads is an error, instead of a wait."""
    return open(
        path,
        "a",
        encoding="utf-8",
        errors="surrogateescape",  # damaged lines stay as they are
        opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK, 0o666),
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _keep_records_until(path: Path, iteration: int, is_repeated: Callable[[Mapping[str, Any]], bool]) -> None:
    """Rewrite ``path`` with its records up to ``iteration``, line by line, because it may be larger than memory."""
    damaged = 0
    with atomic_files(path.parent) as scratch, path.open("rb") as lines, (scratch / path.name).open("wb") as kept:
        for line in lines:
            record = _record(line)
            if record is not None:
                number = record["iteration"]
                if number < iteration or (number == iteration and not is_repeated(record)):
                    kept.write(line)
            elif line.endswith(b"\n"):  # an interrupted write leaves half a line at the end
                with open_to_append(path.with_name(f"{path.name}.damaged")) as aside:
                    aside.write(line.decode(errors="surrogateescape"))
                damaged += 1
    if damaged:
        logger.warning(
            f"{path}: {damaged} lines are not records; they were moved to {path.name}.damaged", extra=EVERY_RANK
        )


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line and its iteration (0 if it has none); None if it is not a record."""
    try:
        record = parse_object(line)
    except ValueError:
        return None
    if not line.endswith(b"\n"):
        return None
    number = record.get("iteration", 0)
    return {**record, "iteration": number} if isinstance(number, (int, float)) else None


class ScalarWriter(Protocol):
    """A writer of curves."""

    def scalar(self, name: str, value: float, iteration: int, samples: int | None = None) -> None:
        """Write a point of the curve ``name``; with ``samples``, also of the curve against samples."""

    def close(self) -> None:
        """Write what is left and close."""


class _Curves:
    """A writer of curves that never stops training: if a value cannot be written, it warns once and writes no more."""

    def __init__(self, name: str, *errors: type[Exception]) -> None:
        """
        Args:
            name: the flag and its value, for the warning.
            errors: the exceptions that writing may raise.
        """
        self._name, self._errors, self._has_failed = name, errors, False

    def _attempt(self, write: Callable[[], None]) -> None:
        if self._has_failed:
            return
        try:
            write()
        except self._errors as error:
            self._has_failed = True
            logger.warning(
                f"{self._name}: cannot be written ({shortened(error)}); later values of the curves are lost",
                extra=EVERY_RANK,
            )


class TensorBoardWriter(_Curves):
    """Writer of curves to TensorBoard, under Megatron-LM's names."""

    def __init__(self, folder: str, queue_size: int) -> None:
        """
        Raises:
            UserError: the folder cannot be written to.
        """
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(f"--tensorboard-dir {folder}", OSError)
        self._other_hook = threading.excepthook
        try:
            self._writer = SummaryWriter(log_dir=folder, max_queue=queue_size)
        except OSError as error:
            raise UserError(f"{self._name}: cannot be written ({error.strerror}); give another folder") from None
        threading.excepthook = self._print_traceback

    def scalar(self, name: str, value: float, iteration: int, samples: int | None = None) -> None:
        """Write ``value``, and with ``samples`` also Megatron-LM's curve against samples."""
        self._attempt(lambda: self._writer.add_scalar(name, value, iteration))
        if samples is not None:
            self._attempt(lambda: self._writer.add_scalar(f"{name} vs samples", value, samples))

    def close(self) -> None:
        """Write what is left in the queue and close the file."""
        self._attempt(self._writer.close)
        threading.excepthook = self._other_hook

    def _print_traceback(self, arguments: threading.ExceptHookArgs) -> None:
        # TensorBoard's thread keeps its error, and the next value raises it again.
        if getattr(arguments.thread, "exception", None) is not arguments.exc_value:
            self._other_hook(arguments)


class WandbWriter(_Curves):
    """A run of Weights & Biases; the library's environment variables control where it goes (``WANDB_MODE=offline``)."""

    def __init__(self, flags: LoggingConfig, save: str | None, arguments: Mapping[str, Any]) -> None:
        """
        Args:
            save: the folder of the run.
            arguments: all flags, which the run's page shows.

        Raises:
            UserError: the package is not installed, or the run cannot be started.
        """
        require_packages("--wandb-project", "wandb")
        import wandb

        super().__init__(f"--wandb-project {flags.wandb_project}", OSError, RuntimeError, wandb.Error)
        folder = flags.wandb_folder(save)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                project=flags.wandb_project,
                entity=flags.wandb_entity,
                name=flags.wandb_exp_name,
                dir=str(folder),
                config=dict(arguments),
            )
        except (OSError, wandb.Error) as error:
            raise UserError(
                f"--wandb-project {flags.wandb_project}: {' '.join(str(error).split())}; log in, or set "
                "WANDB_MODE=offline"
            ) from None

    def scalar(self, name: str, value: float, iteration: int, samples: int | None = None) -> None:
        """Write ``value``, and with ``samples`` Megatron-LM's one curve of samples against iterations."""
        values = {name: value} | ({} if samples is None else {"samples vs steps": samples})
        self._attempt(lambda: self._run.log(values, step=iteration))

    def close(self) -> None:
        """Send or write what is left, and end the run."""
        self._attempt(self._run.finish)
