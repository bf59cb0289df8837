"""One rank's error is every rank's error.

A user's error may show itself on one process only: a file that is missing on one node, a dataset that only the first
rank of a replica opens. Processes that did not see it would wait for the others in a collective until a timeout. Here
every rank ends each phase of the start-up by telling the others how it went, through the rendezvous store, which
needs no process group.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from megatron_dwm.errors import UserError
from megatron_dwm.runtime.process_groups import free_port

PATIENCE = timedelta(hours=2)  # one rank may build a large dataset's index while the others wait


class StartupSync:
    """Phases that all ranks finish together, or fail together with the same error."""

    def __init__(self, rank: int, world_size: int) -> None:
        """Meet the other ranks at MASTER_ADDR:MASTER_PORT; a lone process meets itself.

        Raises:
            UserError: the variables that name the meeting point are missing.
        """
        if world_size == 1 and "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(free_port())
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UserError(f"{name} is not set for {world_size} processes; start them with torchrun, or set it")
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
        self.rank, self.world_size = rank, world_size
        self.store, _, _ = next(dist.rendezvous("env://"))
        self._phases = dist.PrefixStore("phases", self.store)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run a block on every rank; if any rank's raises a UserError, all ranks raise it.

        The block must not wait for other ranks after a point at which it can raise.
        """
        error: UserError | None = None
        try:
            yield
        except UserError as caught:
            error = caught
        if error is not None:
            self._phases.set(f"{name}/error", str(error))
        if self._phases.add(f"{name}/arrived", 1) == self.world_size:
            self._phases.set(f"{name}/complete", "yes")
        self._phases.wait([f"{name}/complete"], PATIENCE)
        if not self._phases.check([f"{name}/error"]):
            return
        message = self._phases.get(f"{name}/error").decode()
        # The store ends with the process that holds it, which therefore leaves last.
        if self._phases.add(f"{name}/read", 1) == self.world_size:
            self._phases.set(f"{name}/everybody-read", "yes")
        if self.rank == 0:
            self._phases.wait([f"{name}/everybody-read"], PATIENCE)
        raise UserError(message) from error
