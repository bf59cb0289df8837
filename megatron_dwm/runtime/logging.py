"""Logging setup: which rank prints a message, and where.

Every module has ``logger = logging.getLogger(__name__)``. Messages up to INFO go to standard output unchanged, because
Megatron-LM's log lines are read by programs; warnings and errors go to standard error, prefixed by their level. As in
Megatron-LM, one rank prints: the first, unless the message names others by ``extra=LAST_RANK`` or ``extra=EVERY_RANK``.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import os
import sys
from datetime import datetime

from megatron_dwm.errors import discard_output

LAST_RANK = {"printing_rank": "last"}
"""For ``extra``: the last rank prints, which is on the last pipeline stage and knows the losses."""
EVERY_RANK = {"printing_rank": "every"}
"""For ``extra``: every rank that logs the message prints it."""


class _RankHandler(logging.Handler):
    """Handler of the messages that this rank should print."""

    def __init__(self, rank: int, world_size: int, *, may_lose: bool) -> None:
        super().__init__()
        self.rank, self.world_size, self.may_lose = rank, world_size, may_lose
        self._has_lost = False

    def filter(self, record: logging.LogRecord) -> bool:
        printing_rank = getattr(record, "printing_rank", "first")
        expected = {"first": 0, "last": self.world_size - 1, "every": self.rank}[printing_rank]
        return self.rank == expected and bool(super().filter(record))

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        # The streams are looked up at each message, so that later redirections have an effect. A line and its end are
        # written in one call, because other ranks print on the same screen.
        try:
            if record.levelno >= logging.WARNING:
                print(f"{record.levelname.lower()}: {text}\n", file=sys.stderr, end="", flush=True)
            else:
                print(f"{text}\n", file=sys.stdout, end="", flush=True)
        except OSError as error:
            if not self.may_lose:
                raise
            self._note_loss(error)

    def _note_loss(self, error: OSError) -> None:
        if self._has_lost:
            return
        self._has_lost = True
        atexit.register(_discard_unwritten)
        if not isinstance(error, BrokenPipeError):  # else nobody reads any more, as after ``| head``
            with contextlib.suppress(OSError):
                text = f"the log cannot be written ({error.strerror}): lines are lost, and the run goes on"
                print(f"warning: {text}\n", file=sys.stderr, end="", flush=True)


def _discard_unwritten() -> None:
    """Discard what could not be written: at its end Python would try again, and exit with code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            discard_output(stream)


def configure_logging(rank: int = 0, world_size: int = 1, *, may_lose: bool = False) -> None:
    """Print this package's messages on the intended ranks; a second call replaces the first.

    Args:
        may_lose: whether messages that cannot be printed are lost with one warning, as a log must not end a run.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell that has started this
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # paths may hold bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")
    print_messages_of("megatron_dwm", rank, world_size, may_lose=may_lose)


def print_messages_of(
    package: str, rank: int, world_size: int, level: int = logging.INFO, *, may_lose: bool = True
) -> None:
    """Print a package's messages from ``level`` on, on the intended ranks; a second call replaces the first."""
    logger = logging.getLogger(package)
    logger.handlers = [_RankHandler(rank, world_size, may_lose=may_lose)]
    logger.setLevel(level)
    logger.propagate = False


def timestamp() -> str:
    """Return the current time as Megatron-LM writes it."""
    return f"{datetime.now():%Y-%m-%d %H:%M:%S.%f}"
