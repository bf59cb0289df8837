"""The ranks of a run meet, and while it starts each shows that it is still there.

They meet at a store, which the first rank holds, or torchrun. A rank that has not come in time is named by the first
rank. So is one that came and then falls silent: each rank that starts moves a number in the store, its heartbeat.
Later, when ranks train, the timeout of their collectives does that work.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from megatron_dwm.errors import EXIT_CODE, PeerError, UserError, print_error, shortened

Has = Callable[[list[str]], bool]
"""Whether the store holds keys."""
PATH = "ranks"
OVER = "over"
"""In place of the heartbeat of a rank whose start is over."""
LINGER_SECONDS = 5.0
"""The store ends with the first rank, so it stays so long until the others have read who is missing."""


class StoreWatch:
    """Ends this process when the store no longer answers: a request to it has no timeout of its own."""

    def __init__(self, timeout: timedelta, seconds: float) -> None:
        """
        Args:
            seconds: between two looks.
        """
        self._timeout, self._seconds, self._answers = timeout, seconds, 0
        self._ended = threading.Event()

    def start(self) -> None:
        """Begin to watch, in a thread."""
        threading.Thread(target=self._watch, name="store-watch", daemon=True).start()

    def answered(self) -> None:
        """Note that the store has answered."""
        self._answers += 1

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()

    def _watch(self) -> None:
        answers, silent_looks = -1, 0
        while not self._ended.wait(self._seconds):
            silent_looks = silent_looks + 1 if self._answers == answers else 0
            answers = self._answers
            if silent_looks * self._seconds >= self._timeout.total_seconds():
                print_error(silence([0], self._timeout))
                os._exit(EXIT_CODE)


def meet(rank: int, world_size: int, timeout: timedelta, store_watch: StoreWatch) -> dist.Store:
    """Meet the other ranks at MASTER_ADDR:MASTER_PORT, and return the store that all of them read and write.

    Args:
        store_watch: begins to watch when the store is there, if there are several ranks.

    Raises:
        UserError: the meeting point is no address or cannot be reached, or ranks have not come within the time: the
            first rank, which is the one to say so, names them.
    """
    host, port = os.environ["MASTER_ADDR"], _port(os.environ["MASTER_PORT"])
    point = f"MASTER_ADDR={host} MASTER_PORT={port}"
    is_holder = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not is_holder:
        _wait_until_reachable(host, port, timeout)
    try:
        store = dist.TCPStore(host, port, world_size, is_holder, timeout, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        reason = shortened(str(error).splitlines()[0], 150)
        raise UserError(f"{point}: the ranks cannot meet there ({reason}); give another address or port") from None
    ranks = dist.PrefixStore(PATH, store)
    if world_size > 1:
        store_watch.start()

    def has(keys: list[str]) -> bool:
        found = ranks.check(keys)
        store_watch.answered()
        return found

    try:
        if ranks.add(str(rank), 1) > 1:
            raise UserError(f"RANK={rank} is the number of two processes; start the run with torchrun, srun or mpirun")
        if rank == 0:
            missing = _look_who_comes(ranks, has, world_size, timeout)
        else:
            missing = _hear_who_comes(ranks, has, rank, timeout)
    except RuntimeError:
        raise UserError(f"rank 0 ended while the ranks met at {point}; see what it has printed") from None
    if missing and rank == 0:
        raise UserError(
            f"{named(missing)} of {world_size} did not come to {point} within {_minutes(timeout)}; see what is printed "
            "there, or raise --distributed-timeout-minutes"
        )
    if missing:
        raise PeerError(f"{named(missing)} did not come")
    return store


class Heartbeats:
    """The heartbeats of the ranks while the run starts. The first rank looks at all, the others at the first rank's."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: timedelta, seconds: float) -> None:
        """
        Args:
            store: a connection of the caller's own.
            seconds: between two looks.
        """
        self._ranks, self._rank, self._timeout = dist.PrefixStore(PATH, store), rank, timeout
        others = list(range(1, world_size)) if rank == 0 else [0]
        self._heartbeats: dict[int, bytes] = dict.fromkeys(others, b"")
        # Looks are counted, not seconds: a job that is suspended as a whole does not get older.
        self._looks = dict.fromkeys(others, 0)
        self._most_looks = max(1, round(timeout.total_seconds() / seconds))

    def beat(self) -> None:
        """Move this rank's heartbeat."""
        self._ranks.add(str(self._rank), 1)

    def end(self) -> None:
        """Say that this rank's start is over."""
        self._ranks.set(str(self._rank), OVER)

    def require_all(self) -> None:
        """Check the heartbeats of other ranks.

        Raises:
            UserError: one has not moved for too long.
        """
        found = self._ranks.multi_get([str(rank) for rank in self._heartbeats])
        for rank, heartbeat in zip(self._heartbeats, found, strict=True):
            is_alive = heartbeat != self._heartbeats[rank] or heartbeat == OVER.encode()
            self._looks[rank] = 0 if is_alive else self._looks[rank] + 1
            self._heartbeats[rank] = heartbeat
        if silent := [rank for rank, looks in self._looks.items() if looks >= self._most_looks]:
            raise silence(silent, self._timeout)


def silence(ranks: list[int], timeout: timedelta) -> UserError:
    """Return the error that ranks have fallen silent."""
    return UserError(
        f"{named(ranks)} did not answer for {_minutes(timeout)} while the run started: killed, stopped or stuck; "
        "see what is printed there, or raise --distributed-timeout-minutes"
    )


def named(ranks: list[int]) -> str:
    """Return the ranks as a message speaks of them."""
    shown = ", ".join(map(str, ranks[:20])) + (f" and {len(ranks) - 20} more" if len(ranks) > 20 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**16):
        raise UserError(f"MASTER_PORT={shortened(text, 40)}: is no port; give a number from 1 to 65535")
    return int(text)


def _wait_until_reachable(host: str, port: int, timeout: timedelta) -> None:
    """Wait until the store can be reached; torch's own waiting ends in pages of text.

    Raises:
        UserError: it cannot be within the time.
    """
    reason = "no answer"

    def is_reachable() -> bool:
        nonlocal reason
        try:
            socket.create_connection((host, port), timeout=5.0).close()
        except OSError as error:
            reason = error.strerror or str(error)
            return False
        return True

    if not _wait_for(is_reachable, timeout):
        raise UserError(
            f"MASTER_ADDR={host} MASTER_PORT={port}: rank 0 was not there for {_minutes(timeout)} ({reason}); see what "
            "it has printed, check the address, or raise --distributed-timeout-minutes"
        )


def _look_who_comes(ranks: dist.Store, has: Has, world_size: int, timeout: timedelta) -> list[int]:
    """Return who has not come, and tell it the others; the first rank's part."""
    expected = [str(rank) for rank in range(world_size)]
    has_all = _wait_for(lambda: has(expected), timeout)
    missing = [] if has_all else [rank for rank in range(world_size) if not has([str(rank)])]
    ranks.set("missing", json.dumps(missing))
    if missing:
        there = [f"read/{rank}" for rank in range(1, world_size) if rank not in missing]
        _wait_for(lambda: not there or has(there), timedelta(seconds=LINGER_SECONDS))
    return missing


def _hear_who_comes(ranks: dist.Store, has: Has, rank: int, timeout: timedelta) -> list[int]:
    """Return whom the first rank misses; it may itself come as late as the time allows, and then wait as long.

    Raises:
        UserError: the first rank does not say.
    """
    if not _wait_for(lambda: has(["missing"]), 2 * timeout + timedelta(seconds=LINGER_SECONDS)):
        raise UserError("rank 0 did not come, or was killed, while the ranks met; see what it has printed")
    missing: list[int] = json.loads(ranks.get("missing"))
    if missing:
        ranks.set(f"read/{rank}", "yes")
    return missing


def _wait_for(is_so: Callable[[], bool], timeout: timedelta) -> bool:
    """Ask again and again, less and less often, until it is so or the time is up; return whether it is."""
    deadline, pause = time.monotonic() + timeout.total_seconds(), 0.02
    while not (found := is_so()) and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)
    return found


def _minutes(timeout: timedelta) -> str:
    minutes = timeout.total_seconds() / 60
    return f"{minutes:g} minute{'s' if minutes != 1 else ''}"
