"""Logging setup: which rank prints a message, and where.

Every module has ``logger = logging.getLogger(__name__)``. Messages up to INFO go to standard output unchanged, because
Megatron-LM's log lines are read by programs; warnings and errors go to standard error, prefixed by their level. As in
Megatron-LM, one rank prints: the first, unless the message names others by ``extra=LAST_RANK`` or ``extra=EVERY_RANK``.
"""

from __future__ import annotations

import logging
import sys
from datetime import datetime

LAST_RANK = {"printing_rank": "last"}
"""For ``extra``: the last rank prints, which is on the last pipeline stage and knows the losses."""
EVERY_RANK = {"printing_rank": "every"}
"""For ``extra``: every rank that logs the message prints it."""


class _RankHandler(logging.Handler):
    """Prints the messages that this rank should print."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size

    def filter(self, record: logging.LogRecord) -> bool:
        printing_rank = getattr(record, "printing_rank", "first")
        expected = {"first": 0, "last": self.world_size - 1, "every": self.rank}[printing_rank]
        return self.rank == expected and bool(super().filter(record))

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        # The streams are looked up at each message: so that later redirections have an effect. A line and its end are
        # written in one piece, since other ranks write to the same screen.
        if record.levelno >= logging.WARNING:
            print(f"{record.levelname.lower()}: {text}\n", file=sys.stderr, end="", flush=True)
        else:
            print(f"{text}\n", file=sys.stdout, end="", flush=True)


def configure_logging(rank: int = 0, world_size: int = 1) -> None:
    """Print this package's messages on the intended ranks; a second call replaces the first."""
    print_messages_of("megatron_dwm", rank, world_size)


def print_messages_of(package: str, rank: int, world_size: int, level: int = logging.INFO) -> None:
    """Print a package's messages from ``level`` on, on the intended ranks; a second call replaces the first."""
    logger = logging.getLogger(package)
    logger.handlers = [_RankHandler(rank, world_size)]
    logger.setLevel(level)
    logger.propagate = False


def timestamp() -> str:
    """Return the current time as Megatron-LM writes it."""
    return f"{datetime.now():%Y-%m-%d %H:%M:%S.%f}"
