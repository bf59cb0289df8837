"""Propagation of one rank's error to all ranks.

A user's error may occur on one process only: a file that is missing on one node, a dataset that only the first
rank of a replica opens. The other processes would wait in a collective until a timeout. Therefore every rank ends each
phase of the start-up by reporting its result to the others, and after the start-up a thread of each rank watches for
failures of others. Both use the rendezvous store, which needs no process group.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from megatron_dwm.errors import EXIT_CODE, INTERRUPTED, PeerError, UserError, exit_code_of, print_error, shortened
from megatron_dwm.runtime.rendezvous import Heartbeats, StoreWatch, free_port, join_ranks, rank_names
from megatron_dwm.runtime.stop_signals import RETRY_EXIT_CODE, StartSignals, exit_after_signal, start_signal_error

PATIENCE = timedelta(hours=2)
"""Long, because one rank may build a large dataset's index while the others wait."""
POLL_SECONDS = 2.0
"""Interval of checks for other ranks' failures; long enough for a store that thousands of ranks query."""
ANSWER_SECONDS = 2.5 * POLL_SECONDS
"""A rank that has not read a reported failure by then is considered dead or stuck."""
LINGER_SECONDS = 4 * POLL_SECONDS
"""The store ends with its process, so the first rank waits until the others have read a failure."""


class StartupSync:
    """Phases of the start-up, which all ranks complete together, or fail together with the same error."""

    def __init__(self, rank: int, world_size: int, timeout: timedelta, signals: StartSignals | None = None) -> None:
        """Join the other ranks at MASTER_ADDR:MASTER_PORT; a single process also has a store.

        Args:
            timeout: how long to wait for ranks that do not join, or do not answer during start-up.
            signals: ends this rank if it receives a signal during start-up; from now on it ends the others, too.

        Raises:
            UserError: the rank is not in the world, MASTER_ADDR or MASTER_PORT is missing, or
                ranks have not joined in time.
        """
        if not 0 <= rank < world_size:
            raise UserError(
                f"RANK={rank} is not between 0 and WORLD_SIZE={world_size}; start the run with torchrun, srun or mpirun"
            )
        if world_size == 1 and "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(free_port())
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UserError(f"{name} is not set for {world_size} processes; start them with torchrun, or set it")
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
        self.rank, self.world_size, self._timeout = rank, world_size, timeout
        self._store_watch = StoreWatch(timeout, POLL_SECONDS)
        self.store = join_ranks(rank, world_size, timeout, self._store_watch)
        self._phases = dist.PrefixStore("phases", self.store)
        self._failures = dist.PrefixStore("failures", self.store)
        self._finished, self._started = threading.Event(), threading.Event()
        self._watcher: threading.Thread | None = None
        self._agreed_error: UserError | None = None
        self._everybody_knows = False
        self._signals = signals
        if signals is not None:
            signals.end = self.end_signaled
        self.is_store_lost = False
        """Whether the store did not answer, because the first rank, which hosts it, has ended or is stuck."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run a block on every rank; if any rank's raises a UserError, all ranks raise one.

        The rank whose error arrives first raises it unchanged; the others raise a :class:`PeerError`, so that it is
        printed once. The block must not wait for other ranks after a point at which it can raise.
        """
        error: UserError | None = None
        try:
            yield
        except UserError as caught:
            error = caught
        try:
            is_first_error, message = self._agree(name, error)
        except dist.DistStoreError:
            missing = [rank for rank in range(self.world_size) if not self._phases.check([f"{name}/arrived/{rank}"])]
            raise UserError(
                f"{rank_names(missing)} did not get past the check of the {name} in {PATIENCE}; see what is printed "
                "there"
            ) from None
        except RuntimeError:
            self.is_store_lost = True
            raise UserError("rank 0 ended while the run started; see what it has printed") from None
        if is_first_error and error is not None:
            self._agreed_error = error
            raise error
        if message is not None:
            raise PeerError(message)

    def _agree(self, name: str, error: UserError | None) -> tuple[bool, str | None]:
        """Exchange the results of a phase; return whether this rank's error is the first, and the first error."""
        is_first_error = error is not None and self._phases.add(f"{name}/errors", 1) == 1
        if is_first_error:
            self._phases.set(f"{name}/error", str(error))
        self._phases.set(f"{name}/arrived/{self.rank}", "yes")
        if self._phases.add(f"{name}/arrived", 1) == self.world_size:
            self._phases.set(f"{name}/complete", "yes")
        self._phases.wait([f"{name}/complete"], PATIENCE)
        if not self._phases.check([f"{name}/errors"]):
            return False, None
        self._phases.wait([f"{name}/error"], PATIENCE)
        message = self._phases.get(f"{name}/error").decode()
        if self._phases.add(f"{name}/read", 1) == self.world_size:
            self._phases.set(f"{name}/everybody-read", "yes")
        if self.rank == 0:
            self._phases.wait([f"{name}/everybody-read"], PATIENCE)
        return is_first_error, message

    def agree_on_command(self, command: str, *, ends_at_once: bool) -> None:
        """Check that all ranks were started with the same command; every rank calls it once.

        Args:
            command: description of what this rank was asked to do.
            ends_at_once: whether this process is about to end; the store must then live until the others have read it.

        Raises:
            UserError: on every rank, if they differ.
        """
        with self.phase("command"):
            self.require_same({"the requested action": command}, "command")
        if ends_at_once:
            self.leave_together("command")

    def leave_together(self, name: str) -> None:
        """End the start after its last phase: the first rank hosts the store, and waits until the others have read it.

        Args:
            name: name of that phase.
        """
        if self.world_size == 1:
            return
        if self._phases.add(f"{name}/left", 1) == self.world_size:
            self._phases.set(f"{name}/everybody-left", "yes")
        if self.rank == 0:
            self._phases.wait([f"{name}/everybody-left"], PATIENCE)

    def require_same(
        self,
        facts: Mapping[str, str],
        name: str = "facts",
        remedy: str = "start every rank with the same command, packages and files",
    ) -> None:
        """Check that this rank's facts are those of the first rank; every rank calls it inside a :meth:`phase`.

        A fact that one of the two does not have is not compared.

        Args:
            name: name of this set of facts; there may be several sets.
            remedy: what to do if they differ, for the message.

        Raises:
            UserError: one differs.
        """
        if self.rank == 0:
            self._phases.set(f"same/{name}", json.dumps(dict(facts)))
            return
        expected = json.loads(self._phases.get(f"same/{name}"))
        for fact, value in facts.items():
            if fact in expected and expected[fact] != value:
                local, first = shortened(value), shortened(expected[fact])
                raise UserError(f"{fact} is {local} on rank {self.rank} and {first} on rank 0; {remedy}")

    def watch_peers(self) -> None:
        """From now on, end this process if another one reports a failure, or stops answering during start-up.

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
        store: Any = self.store
        failures = dist.PrefixStore("failures", store.clone())
        if self._is_first_to_report(json.dumps(failure), failures):
            print_error(start_signal_error(name))
            self._end(failure, failures)
        self._mark_read(failures)
        self._end(json.loads(failures.get("first")), failures)

    def report_failure(self, error: BaseException) -> bool:
        """Report to the other ranks why this one ends.

        Returns:
            whether this is the first failure of the run; those that it causes need not be printed.
        """
        self._finished.set()
        self._store_watch.end()
        if self.world_size == 1 or error is self._agreed_error:  # there are no others, or all of them know it
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
        self._everybody_knows = True  # except those that cannot
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
            print(f"error: rank {self.rank} ends because another rank failed", file=sys.stderr, flush=True)
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
        everybody = [f"read/{rank}" for rank in range(self.world_size)]
        while self.rank == 0 and time.monotonic() < deadline and not store.check(everybody):
            time.sleep(0.1)

    def _watch(self) -> None:
        store: Any = self.store  # torch's types lack the method
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
            line = f"error: rank {self.rank} ends because rank {failure['rank']} failed ({failure['reason']})"
            print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
        self._linger(store)
        os._exit(failure["code"])  # no cleanup, because it could wait for ranks that have ended
