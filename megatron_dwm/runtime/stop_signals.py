"""The signals that make a run save and stop, and their handling during start-up."""

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
"""Exit code of a run that was signaled during start-up: EX_TEMPFAIL of sysexits.h, a temporary failure."""
PATIENCE_SECONDS = 1.0
"""A launcher also signals the ranks after one of them has failed. Within this time that failure ends them first."""


def end_alone(name: str) -> None:
    """End this process after a signal, when no other rank waits for it yet."""
    print_error(signaled(name))
    os._exit(START_AGAIN)


def signaled(name: str) -> UserError:
    """Return the message about a signal."""
    return UserError(f"{name} received during start-up: there is nothing to save; start the run again")


class StartSignals:
    """Ends a process that receives a signal during start-up, when there is nothing to save.

    A thread does this, because Python runs no signal handler while the main thread waits inside a library, for other
    ranks or for an index that is being built.
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
        """Restore the default effect of the signals; from now on the training loop handles them."""
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
