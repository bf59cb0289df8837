"""The entry point of every program that runs on several ranks.

:func:`run_program` joins the other ranks, runs the program, and ends this process so that a failure is printed
once, by the rank that found it, and ends every other rank.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_dwm.config.flags import flag_name
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.errors import (
    EXIT_CODE,
    PeerError,
    UserError,
    as_user_error,
    exit_code_of,
    flush_output,
    print_error,
)
from megatron_dwm.runtime.child_processes import end_children_with_this_process, require_temporary_folder
from megatron_dwm.runtime.compat import require_megatron_core
from megatron_dwm.runtime.device import select_device
from megatron_dwm.runtime.environment import environment_rank
from megatron_dwm.runtime.logging import configure_logging
from megatron_dwm.runtime.peer_watch import PeerWatch
from megatron_dwm.runtime.startup_sync import StartupSync
from megatron_dwm.runtime.stop_signals import StartSignals

Flags = TypeVar("Flags")

_FUTURE = ".*(load_state_dict|ShardedTensor|all_gather_into_tensor|reduce_scatter_tensor).*"
"""torch's warnings about interfaces that megatron-core still uses."""
_SHARDS = ".*grad attribute of a Tensor that is not a leaf Tensor.*"
"""torch's warning about the distributed optimizer's shards of fp32 parameters: views that it gives gradients itself."""
_IN_PLACE_OF_A_RUN = ("-h", "--help", "--help-all", "--plan")
"""Flags that print something instead of running: a rank that alone has one would end while the others wait for it."""


@dataclass(frozen=True)
class Process:
    """This process of a program with several ranks."""

    rank: int
    local_rank: int
    world_size: int
    startup_sync: StartupSync

    def parse(self, read_flags: Callable[[int], Flags]) -> tuple[Flags, torch.device]:
        """Read the flags and choose the device.

        Args:
            read_flags: returns the program's configuration for a number of ranks.

        Raises:
            UserError: on every rank, if one finds a bad flag.
        """
        with self.startup_sync.phase("flags"):
            require_megatron_core()
            require_temporary_folder()
            config = read_flags(self.world_size)
            device = select_device(self.local_rank)
        if device.type == "cpu":  # it advises a setting of CUDA
            warnings.filterwarnings("ignore", message=".*async grad allreduce.*")
        return config, device


def run_program(program: Callable[[Process], None], argv: Sequence[str] | None = None) -> None:
    """Run ``program`` on this rank, started by torchrun, srun or mpirun, or as a single process.

    A user's error ends all ranks with exit code 2, and one line from the rank that found it. Any other failure ends
    them with code 1, with a traceback and one line from each other rank. Ranks that do not join, or do not answer
    before the run has started, are waited for up to ``--distributed-timeout-minutes``.

    Args:
        argv: the program's flags; by default this process's command line.
    """
    # megatron-core warns on every process that optional packages are missing, and of torch interfaces it still uses.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|transformer_engine).*")
    warnings.filterwarnings("ignore", category=FutureWarning, message=_FUTURE)
    warnings.filterwarnings("ignore", message=_SHARDS)
    words = sys.argv[1:] if argv is None else argv
    end_children_with_this_process()
    try:
        rank, local_rank, world_size = environment_rank()
        configure_logging(rank, world_size, may_lose=True)
        signals = StartSignals() if flag_name("exit_signal_handler") in words else None
        startup_sync = StartupSync(rank, world_size, _timeout(words), signals)
    except PeerError:
        raise SystemExit(EXIT_CODE) from None
    except UserError as error:
        print_error(error)
        raise SystemExit(EXIT_CODE) from None
    startup_sync.peers.start()
    asked = {word for word in words if word in _IN_PLACE_OF_A_RUN}
    try:
        startup_sync.agree_on_command(" ".join(sorted(asked)) or "a run", is_ending=bool(asked - {"--plan"}))
        program(Process(rank, local_rank, world_size, startup_sync))
    except (Exception, KeyboardInterrupt) as error:
        _end_failed(as_user_error(error, words), startup_sync.peers)
    _end_children()
    startup_sync.peers.finish()
    if dist.is_initialized():
        dist.destroy_process_group()


def _end_children() -> None:
    """Kill the processes that this one has started and that still run.

    At its end Python would send SIGTERM to workers of data loaders, which ignore it, and wait for them without end. It
    would also wait for processes that write checkpoints, which wait for the next one, or fail once their results have
    no receiver.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise when a worker ends
    for worker in multiprocessing.active_children():
        worker.kill()


def _timeout(argv: Sequence[str]) -> timedelta:
    """Return ``--distributed-timeout-minutes``, which is needed before the other flags are parsed.

    Ranks join before they parse the flags, so that a mistake is reported once. A mistake in this flag is left to the
    parser.
    """
    name = flag_name("distributed_timeout_minutes")
    minutes = ParallelConfig().distributed_timeout_minutes
    for word, following in itertools.pairwise([*argv, ""]):
        text = following if word == name else word.removeprefix(f"{name}=")
        if word.partition("=")[0] == name and text.isascii() and text.isdigit() and int(text[:9]) > 0:
            minutes = int(text[:9])
    return timedelta(minutes=minutes)


def _end_failed(error: BaseException, peers: PeerWatch) -> None:
    """End this process after a failure, which is printed unless another rank's failure came first.

    Raises:
        SystemExit: this is the only process, or all ranks know of the failure; otherwise the process ends here.
    """
    flush_output()
    _end_children()
    if isinstance(error, PeerError):
        raise SystemExit(EXIT_CODE) from None
    if not peers.report(error):
        peers.end_with_first_failure()
    if isinstance(error, UserError):
        print_error(error)
    elif isinstance(error, KeyboardInterrupt):
        print_error(UserError("SIGINT (Ctrl-C) has ended the run; with --exit-signal-handler it saves before it ends"))
    else:
        traceback.print_exception(error)
        for rank in peers.silent_ranks():
            print_error(UserError(f"rank {rank} does not answer: it was killed, is stopped or is stuck"))
    peers.linger()
    code = exit_code_of(error)
    if peers.world_size > 1:  # no cleanup: what it would wait for may be gone
        flush_output()
        os._exit(code)
    raise SystemExit(code) from None
