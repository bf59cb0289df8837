"""The signals that ask a run to save and stop, and what becomes of one that comes while the run starts."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

from megatron_dwm.errors import UserError, print_error

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""SLURM and torchrun send SIGTERM, a keyboard SIGINT, and schedulers' warnings are often SIGUSR1 or SIGUSR2."""
START_AGAIN = 75
"""Exit code of a run that was signaled while it started; sysexits.h has it for what may succeed the next time."""
PATIENCE_SECONDS = 1.0
"""A launcher signals the ranks when one of them has failed: they shall end with that failure, which comes first."""


def end_alone(name: str) -> None:
    """End this process after a signal; no other waits for it yet."""
    print_error(signaled(name))
    os._exit(START_AGAIN)


def signaled(name: str) -> UserError:
    """Return what is said of a signal."""
    return UserError(f"{name} came while the run started: there is nothing to save; start it again")


class StartSignals:
    """Ends a process that is signaled while its run starts: there is nothing to save.

    A thread does that, as the main one may wait in a library for other ranks, or for an index to be built, until when
    Python calls no handler.
    """

    def __init__(self) -> None:
        self.end = end_alone
        """Ends the process; its argument is the name of the signal."""
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._watch, name="start-signals", daemon=True).start()

    def close(self) -> None:
        """Let signals do what they do by themselves, or what the run will have them do."""
        if self._writer.fileno() >= 0:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            self._writer.close()

    def _watch(self) -> None:
        while received := self._reader.recv(1):
            if received[0] in STOP_SIGNALS:
                time.sleep(PATIENCE_SECONDS)
                self.end(signal.Signals(received[0]).name)
        self._reader.close()
