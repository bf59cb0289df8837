"""Reports of a rank's failure to the other ranks, and the watch for failures of others.

A rank that fails would leave the others in a collective until its timeout. Therefore it reports why it ends, in the
rendezvous store, and a thread of each rank looks there.
"""

from __future__ import annotations

import json
import os
import threading
import time
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from megatron_dwm.errors import EXIT_CODE, INTERRUPTED, UserError, exit_code_of, flush_output, print_error
from megatron_dwm.runtime.rendezvous import Heartbeats, StoreWatch
from megatron_dwm.runtime.stop_signals import RETRY_EXIT_CODE, StartSignals, exit_after_signal, start_signal_error

POLL_SECONDS = 2.0
"""Interval of checks for other ranks' failures; long enough for a store that thousands of ranks query."""
ANSWER_SECONDS = 2.5 * POLL_SECONDS
"""A rank that has not read a reported failure by then is considered dead or stuck."""
LINGER_SECONDS = 4 * POLL_SECONDS
"""The store ends with its process, so the first rank waits until the others have read a failure."""


class PeerWatch:
    """Watch that ends this rank if another one has failed, and reports this rank's failure to the others."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: dist.Store,
        timeout: timedelta,
        store_watch: StoreWatch,
        signals: StartSignals | None = None,
    ) -> None:
        """
        Args:
            store: the rendezvous store.
            timeout: how long a rank may be silent during start-up.
            store_watch: ends this process during start-up if the store does not answer.
            signals: ends this rank if it receives a signal during start-up; from now on it ends the others, too.
        """
        self.rank, self.world_size, self._timeout = rank, world_size, timeout
        self._store, self._store_watch, self._signals = store, store_watch, signals
        self._failures = dist.PrefixStore("failures", store)
        self._finished, self._started = threading.Event(), threading.Event()
        self._watcher: threading.Thread | None = None
        self._everybody_knows = False
        self.known_error: UserError | None = None
        """An error that all ranks know already."""
        self.is_store_lost = False
        """Whether the store did not answer, because the first rank, which hosts it, has ended or is stuck."""
        if signals is not None:
            signals.end = self.end_signaled

    def start(self) -> None:
        """Start the watch: end this process if another one reports a failure, or stops answering during start-up.

        A rank that waits in a collective for one that has failed would otherwise wait until the collective's timeout.
        It ends within :data:`POLL_SECONDS`, with the exit code of a user's error or 1.
        """
        if self.world_size > 1:
            self._watcher = threading.Thread(target=self._watch, name="peer-watch", daemon=True)
            self._watcher.start()

    def end_start(self) -> None:
        """Stop checking heartbeats: from now on ranks wait in collectives, which have a timeout."""
        self._started.set()
        self._store_watch.end()
        if self._signals is not None:
            self._signals.close()

    def end_signaled(self, name: str) -> NoReturn:
        """End all ranks after a signal during start-up; the first rank to report it prints the reason.

        Args:
            name: name of the signal.
        """
        failure = {"rank": self.rank, "code": RETRY_EXIT_CODE, "reason": name}
        if self.world_size == 1:
            exit_after_signal(name)
        store: Any = self._store
        failures = dist.PrefixStore("failures", store.clone())
        if self._is_first_to_report(json.dumps(failure), failures):
            print_error(start_signal_error(name))
            self._end(failure, failures)
        self._mark_read(failures)
        self._end(json.loads(failures.get("first")), failures)

    def report(self, error: BaseException) -> bool:
        """Report to the other ranks why this one ends.

        Returns:
            whether this is the first failure of the run; those that it causes need not be printed.
        """
        self._finished.set()
        self._store_watch.end()
        if self.world_size == 1 or error is self.known_error:  # there are no others, or all of them know it
            self._everybody_knows = True
            return True
        failure = self._description(error)
        answers: list[bool] = []
        # In a thread, because calls to a store never return if its host process is stopped.
        asking = threading.Thread(
            target=lambda: answers.append(self._is_first_to_report(failure, self._failures)), daemon=True
        )
        asking.start()
        asking.join(ANSWER_SECONDS)
        self.is_store_lost = self.is_store_lost or not answers
        return self.is_store_lost or answers[0]

    def silent_ranks(self) -> list[int]:
        """Return the ranks that do not answer after a failure that this one has reported; waits for their answers."""
        if self._everybody_knows:
            return []
        if self.is_store_lost:
            return [0] if self.rank != 0 else []
        deadline, silent = time.monotonic() + ANSWER_SECONDS, list(range(self.world_size))
        try:
            while silent and time.monotonic() < deadline:
                silent = [rank for rank in silent if not self._failures.check([f"read/{rank}"])]
                time.sleep(0.1)
        except RuntimeError:  # the first rank has stopped waiting, or was killed too
            return silent
        self._everybody_knows = True  # all that can answer
        return silent

    def _description(self, error: BaseException) -> str:
        """Return the description of an error for other ranks."""
        code = exit_code_of(error)
        text = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
        return json.dumps({"rank": self.rank, "code": code, "reason": reason})

    def _is_first_to_report(self, failure: str, store: dist.Store) -> bool:
        try:
            is_first = store.add("count", 1) == 1
            if is_first:
                store.set("first", failure)
                self._mark_read(store)
        except RuntimeError:  # the store has ended with its host
            self.is_store_lost = True
            return True
        return is_first

    def end_with_first_failure(self) -> NoReturn:
        """End this process with the run's first failure, which another rank has reported."""
        try:
            failure = json.loads(self._failures.get("first"))
            self._mark_read(self._failures)
        except RuntimeError:  # the store has ended with its host, which was killed or has stopped waiting
            print_error(UserError(f"rank {self.rank} ends because another rank failed"))
            os._exit(1)
        self._end(failure, self._failures)

    def finish(self) -> None:
        """Stop watching: the run has ended normally, and its ranks exit one after the other."""
        self._finished.set()
        self._store_watch.end()
        if self._watcher is not None:  # it reports to the others that this rank has ended
            self._watcher.join(POLL_SECONDS)

    def linger(self) -> None:
        """Wait after a reported failure until the others have read it, if this rank hosts the store."""
        if not (self._everybody_knows or self.is_store_lost):
            self._linger(self._failures)

    def _mark_read(self, store: dist.Store) -> None:
        # One key per rank and not a count, because a rank's main thread and its watcher may both read the failure.
        store.set(f"read/{self.rank}", "yes")

    def _linger(self, store: dist.Store) -> None:
        deadline = time.monotonic() + LINGER_SECONDS
        answers = [f"read/{rank}" for rank in range(self.world_size)]
        while self.rank == 0 and time.monotonic() < deadline and not store.check(answers):
            time.sleep(0.1)

    def _watch(self) -> None:
        store: Any = self._store  # torch's types lack the method
        connection = store.clone()  # the main connection may be blocked by a wait
        failures = dist.PrefixStore("failures", connection)
        heartbeats = Heartbeats(connection, self.rank, self.world_size, self._timeout, POLL_SECONDS)
        is_starting = True
        try:
            while not self._finished.wait(POLL_SECONDS):
                if failures.check(["first"]):
                    failure = json.loads(failures.get("first"))
                    self._mark_read(failures)
                    if self._finished.is_set():
                        return
                    self._end(failure, failures)
                if is_starting and self._started.is_set():
                    heartbeats.end()
                    is_starting = False
                elif is_starting:
                    heartbeats.beat()
                    self._require_heartbeats(heartbeats, failures)
                self._store_watch.answered()
            if is_starting:
                heartbeats.end()
        except RuntimeError:  # the store has ended; ranks that wait for its host notice that
            return

    def _require_heartbeats(self, heartbeats: Heartbeats, failures: dist.Store) -> None:
        """End this process if another one has stopped answering."""
        try:
            heartbeats.require_all()
        except UserError as error:
            description = self._description(error)
            if self._is_first_to_report(description, failures):
                print_error(error)
            self._end(json.loads(description), failures)

    def _end(self, failure: dict[str, Any], store: dist.Store) -> NoReturn:
        # For these the failed rank's line is enough.
        if failure["code"] not in (EXIT_CODE, INTERRUPTED, RETRY_EXIT_CODE):
            reason = f"rank {failure['rank']} failed ({failure['reason']})"
            print_error(UserError(f"rank {self.rank} ends because {reason}"))
        flush_output()
        self._linger(store)
        os._exit(failure["code"])  # no cleanup, because it could wait for ranks that have ended
