"""Runs of several processes take turns, whichever worker of pytest starts them.

Where processes outnumber the cores twice, one that waits for a message waits until its sender is scheduled: two runs of
four processes beside each other took several times as long as one after the other.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))


def _lock(name: str) -> FileLock:
    return FileLock(Path(tempfile.gettempdir(), f"megatron-dwm-tests-{_RUN}-{name}.lock"))


_HALVES = ("first-half", "second-half")
_NEXT = "next"
"""Held by whoever waits for a half or for both: else runs that need one only would leave no moment with both free."""


@contextmanager
def turn(processes: int) -> Iterator[None]:
    """Wait until a run of ``processes`` may start: two of two at a time, a larger one alone, one process at once."""
    halves = [_lock(name) for name in _HALVES]  # made here, because a fork may not use its parent's
    with ExitStack() as held:
        if processes > 1:
            with _lock(_NEXT):
                if processes > 2:
                    for half in halves:
                        held.enter_context(half)
                else:
                    held.enter_context(_free(halves))
        yield


def _free(halves: list[FileLock]) -> AbstractContextManager[object]:
    while True:
        for half in halves:
            with suppress(Timeout):
                return half.acquire(blocking=False)
        time.sleep(0.05)
