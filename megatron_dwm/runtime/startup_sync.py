"""Phases of a run's start-up, which all ranks complete together.

A user's error may occur on one process only: a file that is missing on one node, a dataset that only the first
rank of a replica opens. The other processes would wait in a collective until a timeout. Therefore every rank ends each
phase of the start-up by reporting its result to the others through the rendezvous store, which needs no process group.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from megatron_dwm.errors import PeerError, UserError, shortened
from megatron_dwm.runtime.peer_watch import POLL_SECONDS, PeerWatch
from megatron_dwm.runtime.rendezvous import StoreWatch, free_port, join_ranks, rank_names
from megatron_dwm.runtime.stop_signals import StartSignals

PATIENCE = timedelta(hours=2)
"""Timeout of a phase. It is long, because one rank may build a large dataset's index while the others wait."""


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
        self.rank, self.world_size = rank, world_size
        store_watch = StoreWatch(timeout, POLL_SECONDS)
        self.store = join_ranks(rank, world_size, timeout, store_watch)
        self._phases = dist.PrefixStore("phases", self.store)
        self.peers = PeerWatch(rank, world_size, self.store, timeout, store_watch, signals)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run a block on every rank; if it raises a UserError on any rank, all ranks raise one.

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
                f"{rank_names(missing)} did not complete the phase {name} of the start-up within {PATIENCE}; see what "
                "is printed there"
            ) from None
        except RuntimeError:
            self.peers.is_store_lost = True
            raise UserError("rank 0 ended while the run started; see what it has printed") from None
        if is_first_error and error is not None:
            self.peers.known_error = error
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

    def agree_on_command(self, command: str, *, is_ending: bool) -> None:
        """Check that all ranks were started with the same command; every rank calls it once.

        Args:
            command: description of what this rank was asked to do.
            is_ending: whether this process is about to end; the store must then live until the others have read it.

        Raises:
            UserError: on every rank, if they differ.
        """
        with self.phase("command"):
            self.require_same({"the requested action": command}, "command")
        if is_ending:
            self.leave_together("command")

    def leave_together(self, name: str) -> None:
        """End the start after its last phase: the first rank hosts the store, and waits until the others have read it.

        Args:
            name: name of that phase.
        """
        if self.world_size == 1:
            return
        if self.rank != 0:  # its watch reads the store, which ends with the first rank
            self.peers.finish()
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

    def end(self) -> None:
        """End the start-up: from now on ranks wait in collectives, which have a timeout."""
        self.peers.end_start()
