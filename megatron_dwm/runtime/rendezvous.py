"""The rendezvous of a run's ranks, and their heartbeats during start-up.

Ranks join through a store, which is hosted by the first rank or torchrun. A rank that has not joined in time is named
by the first rank. So is one that has joined and then stops answering: each rank increments a counter in the store, its
heartbeat. During training, the timeout of collectives serves the same purpose.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from megatron_dwm.errors import EXIT_CODE, PeerError, UserError, print_error, shortened

KeysExist = Callable[[list[str]], bool]
"""A function that returns whether the store holds all of some keys."""
PREFIX = "ranks"
"""Prefix of this module's keys in the store."""
STARTUP_OVER = "over"
"""Replaces the heartbeat of a rank whose start-up is over."""
NAME_SECONDS = 10.0
"""How long the first rank waits for its machine's name to be known; a cluster's name service may learn it late."""
LINGER_SECONDS = 5.0
"""The store ends with the first rank, which therefore waits until the others have read which ranks are missing."""


def free_port() -> int:
    """Return an unused TCP port of this host, which no connection takes before the caller listens on it.

    Outgoing connections have ports from 32768 on (Linux's default ``ip_local_port_range``). Below that, a port is drawn
    at random, without the seeded generators, so that programs started together do not get the same one.
    """
    while True:
        port = secrets.choice(range(20000, 32768))
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port))
            return port


class StoreWatch:
    """Watch that ends this process when the store no longer answers, because requests to it have no timeout."""

    def __init__(self, timeout: timedelta, seconds: float) -> None:
        """
        Args:
            seconds: interval of the checks.
        """
        self._timeout, self._seconds, self._answers = timeout, seconds, 0
        self._ended = threading.Event()

    def start(self) -> None:
        """Start to watch, in a thread."""
        threading.Thread(target=self._watch, name="store-watch", daemon=True).start()

    def answered(self) -> None:
        """Note that the store has answered."""
        self._answers += 1

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()

    def _watch(self) -> None:
        answers, silent_checks = -1, 0
        while not self._ended.wait(self._seconds):
            silent_checks = silent_checks + 1 if self._answers == answers else 0
            answers = self._answers
            if silent_checks * self._seconds >= self._timeout.total_seconds():
                print_error(no_answer_error([0], self._timeout))
                os._exit(EXIT_CODE)


def join_ranks(rank: int, world_size: int, timeout: timedelta, store_watch: StoreWatch) -> dist.Store:
    """Join the other ranks at MASTER_ADDR:MASTER_PORT, and return the store that all of them use.

    Args:
        store_watch: is started when the store exists, if there are several ranks.

    Raises:
        UserError: the address is not valid or cannot be reached, or ranks have not joined in time: the
            first rank names them.
    """
    host, port = os.environ["MASTER_ADDR"], _port(os.environ["MASTER_PORT"])
    if not host:
        raise UserError("MASTER_ADDR is empty; give the name or IP address of rank 0's machine")
    point = f"MASTER_ADDR={host} MASTER_PORT={port}"
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if is_host:
        _wait_until_known(host, port, timeout)
    else:
        _wait_until_reachable(host, port, timeout)
    try:
        store = dist.TCPStore(host, port, world_size, is_host, timeout, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        reason = shortened(str(error).splitlines()[0], 150)
        raise UserError(f"{point}: the rendezvous cannot be opened ({reason}); give another address or port") from None
    ranks = dist.PrefixStore(PREFIX, store)
    if world_size > 1:
        store_watch.start()

    def has(keys: list[str]) -> bool:
        found = ranks.check(keys)
        store_watch.answered()
        return found

    try:
        if ranks.add(str(rank), 1) > 1:
            raise UserError(f"RANK={rank} is used by two processes; start the run with torchrun, srun or mpirun")
        if rank == 0:
            missing = _find_missing_ranks(ranks, has, world_size, timeout)
        else:
            missing = _receive_missing_ranks(ranks, has, rank, timeout)
    except RuntimeError:
        raise UserError(f"rank 0 ended while the ranks were joining at {point}; see its output") from None
    if missing and rank == 0:
        raise UserError(
            f"{rank_names(missing)} of {world_size} did not join at {point} within {_minutes(timeout)}; see what is "
            "printed there, or raise --distributed-timeout-minutes"
        )
    if missing:
        raise PeerError(f"{rank_names(missing)} did not join")
    return store


class Heartbeats:
    """The heartbeats of the ranks during start-up. The first rank checks all others, which check the first rank."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: timedelta, seconds: float) -> None:
        """
        Args:
            store: a separate connection.
            seconds: interval of the checks.
        """
        self._ranks, self._rank, self._timeout = dist.PrefixStore(PREFIX, store), rank, timeout
        others = list(range(1, world_size)) if rank == 0 else [0]
        self._heartbeats: dict[int, bytes] = dict.fromkeys(others, b"")
        # Checks are counted, not seconds, so that a job that was suspended does not find all ranks silent.
        self._silent_checks = dict.fromkeys(others, 0)
        self._max_silent_checks = max(1, round(timeout.total_seconds() / seconds))

    def beat(self) -> None:
        """Increment this rank's heartbeat."""
        self._ranks.add(str(self._rank), 1)

    def end(self) -> None:
        """Report that this rank's start-up is over."""
        self._ranks.set(str(self._rank), STARTUP_OVER)

    def require_all(self) -> None:
        """Check the heartbeats of other ranks.

        Raises:
            UserError: one has not moved for too long.
        """
        found = self._ranks.multi_get([str(rank) for rank in self._heartbeats])
        for rank, heartbeat in zip(self._heartbeats, found, strict=True):
            is_alive = heartbeat != self._heartbeats[rank] or heartbeat == STARTUP_OVER.encode()
            self._silent_checks[rank] = 0 if is_alive else self._silent_checks[rank] + 1
            self._heartbeats[rank] = heartbeat
        if silent := [rank for rank, checks in self._silent_checks.items() if checks >= self._max_silent_checks]:
            raise no_answer_error(silent, self._timeout)


def no_answer_error(ranks: list[int], timeout: timedelta) -> UserError:
    """Return the error that ranks have stopped answering."""
    return UserError(
        f"{rank_names(ranks)} did not answer for {_minutes(timeout)} while the run started: killed, stopped or stuck; "
        "see what is printed there, or raise --distributed-timeout-minutes"
    )


def rank_names(ranks: list[int]) -> str:
    """Return the ranks in words, for messages."""
    shown = ", ".join(map(str, ranks[:20])) + (f" and {len(ranks) - 20} more" if len(ranks) > 20 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**16):
        raise UserError(f"MASTER_PORT={shortened(text, 40)}: not a port; give a number from 1 to 65535")
    return int(text)


def _wait_until_known(host: str, port: int, timeout: timedelta) -> None:
    """Wait until the host's name has an address; torch's wait is longer, and ends with pages of output.

    Raises:
        UserError: it has none within :data:`NAME_SECONDS`.
    """
    limit = min(timeout, timedelta(seconds=NAME_SECONDS))
    if (reason := _wait_for_success(lambda: socket.getaddrinfo(host, port), limit)) is not None:
        raise UserError(f"MASTER_ADDR={host}: {reason}; give the name or IP address of rank 0's machine")


def _wait_until_reachable(host: str, port: int, timeout: timedelta) -> None:
    """Wait until the store can be reached; torch's wait ends with pages of output.

    Raises:
        UserError: it cannot be within the time.
    """

    def connect() -> None:
        socket.create_connection((host, port), timeout=5.0).close()

    if (reason := _wait_for_success(connect, timeout)) is not None:
        raise UserError(
            f"MASTER_ADDR={host} MASTER_PORT={port}: rank 0 was not reached for {_minutes(timeout)} ({reason}); see "
            "its output, check the address, or raise --distributed-timeout-minutes"
        )


def _wait_for_success(attempt: Callable[[], object], timeout: timedelta) -> str | None:
    """Repeat an attempt until it raises no OSError; return the last error's reason if the time is up before."""
    reason: str | None = None

    def succeeds() -> bool:
        nonlocal reason
        try:
            attempt()
        except OSError as error:
            reason = error.strerror or str(error)
            return False
        return True

    return None if _wait_for(succeeds, timeout) else reason


def _find_missing_ranks(ranks: dist.Store, has: KeysExist, world_size: int, timeout: timedelta) -> list[int]:
    """Return the missing ranks, and report them to the other ranks; called on the first rank."""
    expected = [str(rank) for rank in range(world_size)]
    has_all = _wait_for(lambda: has(expected), timeout)
    missing = [] if has_all else [rank for rank in range(world_size) if not has([str(rank)])]
    ranks.set("missing", json.dumps(missing))
    if missing:
        there = [f"read/{rank}" for rank in range(1, world_size) if rank not in missing]
        _wait_for(lambda: not there or has(there), timedelta(seconds=LINGER_SECONDS))
    return missing


def _receive_missing_ranks(ranks: dist.Store, has: KeysExist, rank: int, timeout: timedelta) -> list[int]:
    """Return the ranks that the first rank reports as missing; it may itself join just before the timeout.

    Raises:
        UserError: the first rank does not answer.
    """
    if not _wait_for(lambda: has(["missing"]), 2 * timeout + timedelta(seconds=LINGER_SECONDS)):
        raise UserError("rank 0 did not start, or was killed, while the ranks were joining; see its output")
    missing: list[int] = json.loads(ranks.get("missing"))
    if missing:
        ranks.set(f"read/{rank}", "yes")
    return missing


def _wait_for(condition: Callable[[], bool], timeout: timedelta) -> bool:
    """Poll a condition, with growing intervals, until it holds or the time is up; return whether it holds."""
    deadline, pause = time.monotonic() + timeout.total_seconds(), 0.02
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)
    return found


def _minutes(timeout: timedelta) -> str:
    minutes = timeout.total_seconds() / 60
    return f"{minutes:g} minute{'s' if minutes != 1 else ''}"
