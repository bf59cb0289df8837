"""The ranks of a run as processes that can be disturbed: forks of this process, which has imported what they need.

Each rank is the leader of a session, so that its child processes can be found and ended after it.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import torch

from megatron_dwm.runtime.rendezvous import free_port

_IMPORTS = (
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.tokenizers.text.utils.build_tokenizer",
    "megatron_dwm.cli.pretrain",
    "megatron_dwm.cli.rank_agreement",
    "megatron_dwm.data.gpt_dataset",
    "megatron_dwm.model.hf_weights",
    "megatron_dwm.training.setup",
    "megatron_dwm.weighting.build",
    "transformers.models.llama.modeling_llama",
)


def preload_modules() -> None:
    """Import in this process what its forks would import one by one, ten seconds of each start."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that has found a GPU cannot be forked
    torch.set_num_threads(1)  # nor one whose threads compute
    for module in _IMPORTS:
        importlib.import_module(module)


class Ranks:
    """The ranks of one start of ``pretrain_dwm.py``."""

    def __init__(self, argv: Sequence[str], world_size: int, logs: Path) -> None:
        """
        Args:
            argv: the flags of the run.
            logs: the folder for what the ranks print.
        """
        self.world_size, self.logs = world_size, logs
        logs.mkdir(parents=True)
        port, context = free_port(), multiprocessing.get_context("fork")
        self._processes: list[BaseProcess] = [
            context.Process(target=_be_rank, args=(rank, world_size, port, list(argv), self.log(rank)))
            for rank in range(world_size)
        ]
        atexit.register(self.end)
        for process in self._processes:
            process.start()

    def log(self, rank: int) -> Path:
        """Return the file that holds what a rank prints."""
        return self.logs / f"rank{rank}.log"

    def printed(self, rank: int) -> str:
        """Return what a rank has printed so far."""
        path = self.log(rank)
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    @property
    def codes(self) -> list[int | None]:
        """Exit code of each rank, minus the signal that ended it, None while it runs."""
        return [process.exitcode for process in self._processes]

    def wait_until(self, has_come: Callable[[], bool], seconds: float) -> bool:
        """Wait until ``has_come``, unless all ranks end or the time is up first; return whether it has come."""
        deadline = time.monotonic() + seconds
        while not (found := has_come()) and None in self.codes and time.monotonic() < deadline:
            time.sleep(2e-3)
        return found

    def wait(self, seconds: float, excluded: int | None = None) -> bool:
        """Wait for the end of all ranks, except for ``excluded``; return whether they have ended."""
        deadline = time.monotonic() + seconds
        while not (ended := all(code is not None for rank, code in enumerate(self.codes) if rank != excluded)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        return ended

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        process = self._processes[rank]
        if process.exitcode is None and process.pid is not None:
            os.kill(process.pid, number)

    def send_to_all(self, number: signal.Signals) -> None:
        """Send a signal to all ranks and their child processes, as SLURM does."""
        for process in self.running():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def limit_files(self, size: int) -> None:
        """Limit the size of files that the run's processes write; beyond it they get an error as from a full disk."""
        for process in self.running():
            with contextlib.suppress(OSError):
                _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))

    def running(self) -> list[psutil.Process]:
        """Return the processes of the run: its ranks, and all that these have started."""
        sessions = {process.pid for process in self._processes}
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def wait_for_children(self, seconds: float) -> list[str]:
        """Wait for the end of the ended ranks' child processes; return the command lines of those that still run."""
        deadline = time.monotonic() + seconds
        while (left := self.running()) and time.monotonic() < deadline:
            time.sleep(0.05)
        lines = []
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                lines.append(f"{process.pid}: {' '.join(process.cmdline())[:100]}")
        return lines

    def end(self) -> None:
        """Kill whatever is left of the run."""
        self.send_to_all(signal.SIGKILL)
        for process in self._processes:
            process.join()
        atexit.unregister(self.end)


def _be_rank(rank: int, world_size: int, port: int, argv: list[str], log: Path) -> None:
    os.setsid()
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from megatron_dwm.cli.pretrain import main

    main(argv)
