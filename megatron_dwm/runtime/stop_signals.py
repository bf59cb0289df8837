"""The signals that ask a run to save and stop, and their handling during start-up, when there is nothing to save."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

from megatron_dwm.errors import UserError, print_error

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""SLURM and torchrun send SIGTERM, Ctrl-C sends SIGINT, and schedulers often warn with SIGUSR1 or SIGUSR2. SIGHUP comes
from a terminal that is closed."""
RETRY_EXIT_CODE = 75
"""Exit code of a run that was signaled during start-up: ``EX_TEMPFAIL`` of sysexits.h, which asks for another try."""
PATIENCE_SECONDS = 1.0
"""How long a rank waits before it exits: if a launcher sent the signal because another rank failed, that rank's error
should be printed first."""


def signals_to_handle() -> list[signal.Signals]:
    """Return the signals that ask this process to stop: not SIGHUP if ``nohup`` has made the process ignore it."""
    return [one for one in STOP_SIGNALS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]


def exit_after_signal(name: str) -> None:
    """End this process after a signal, at a time when no other process waits for it yet."""
    print_error(start_signal_error(name))
    os._exit(RETRY_EXIT_CODE)


def start_signal_error(name: str) -> UserError:
    """Return the error of a run that was signaled during start-up."""
    return UserError(f"{name} received during start-up: there is nothing to save; start the run again")


class StartSignals:
    """Handling of signals during start-up, when there is nothing to save: they end the process.

    This is done by a thread, because Python runs signal handlers only in the main thread, which may be waiting inside
    a library: for other ranks, or until an index is built.
    """

    def __init__(self) -> None:
        self.end = exit_after_signal
        """Ends the process; its argument is the name of the signal."""
        self._signals = signals_to_handle()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in self._signals:
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._watch, name="start-signals", daemon=True).start()

    def close(self) -> None:
        """Restore the default handling of signals; the run may then install its own."""
        if self._writer.fileno() >= 0:
            for number in self._signals:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            self._writer.close()

    def _watch(self) -> None:
        while received := self._reader.recv(1):
            if received[0] in self._signals:
                time.sleep(PATIENCE_SECONDS)
                if self._writer.fileno() < 0:  # the run has begun meanwhile, and can save
                    os.kill(os.getpid(), received[0])
                    break
                self.end(signal.Signals(received[0]).name)
        self._reader.close()
