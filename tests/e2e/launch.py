"""Run commands on several processes as torchrun would, in forks of the tests, which have imported everything."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from megatron_dwm.cli import pretrain as pretrain_command
from megatron_dwm.runtime.rendezvous import free_port
from tests.distributed.harness import become_rank, checkpoint_manager
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, as_argv, parse_flags
from tests.turns import turn

_TOKENIZERS = "megatron.core.tokenizers"
# What a run imports late, imported here so that its processes inherit it; it would take each two seconds.
for module in (
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.torch",
    f"{_TOKENIZERS}.{'utils' if find_spec(f'{_TOKENIZERS}.utils') else 'text.utils'}.build_tokenizer",
    "megatron_dwm.data.gpt_dataset",
    "megatron_dwm.model.hf_weights",
    "megatron_dwm.training.setup",
    "megatron_dwm.weighting.build",
    "transformers.models.llama.modeling_llama",
    "transformers.models.modernbert.modeling_modernbert",
):
    importlib.import_module(module)
parse_flags({**LANGUAGE_MODEL, **TRAINING, **DATA})  # which reads the declarations of all flags, once
get_checkpoint_conversion_mapping("llama")  # which compiles 900 regular expressions, once


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    codes: list[int]
    """Exit code of each process."""
    output: list[str]
    """Standard output of each process."""
    errors: list[str]
    """Standard error of each process."""

    @property
    def text(self) -> str:
        return "\n".join(f"--- rank {n}\n{o}{e}" for n, (o, e) in enumerate(zip(self.output, self.errors, strict=True)))


def pretrain(
    folder: Path, processes: int, flags: dict[str, Any], main: Callable[[], None] = pretrain_command.main
) -> Finished:
    """Run ``pretrain_dwm.py`` with ``flags``, as :func:`as_argv` takes them.

    Args:
        folder: where the processes' output is kept.
        main: another command's, which takes these flags and is run instead.
    """
    argv = as_argv(flags)
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    port = free_port()
    manager = checkpoint_manager()
    workers = [
        context.Process(target=_work, args=(rank, processes, port, argv, folder, main, manager))
        for rank in range(processes)
    ]
    with turn(processes):
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    return Finished(
        [worker.exitcode or 0 for worker in workers],
        [(folder / f"rank{rank}.out").read_text() for rank in range(processes)],
        [(folder / f"rank{rank}.err").read_text() for rank in range(processes)],
    )


def succeed(folder: Path, processes: int, flags: dict[str, Any]) -> Finished:
    """Run :func:`pretrain`, and check that it succeeds."""
    finished = pretrain(folder, processes, flags)
    assert finished.codes == [0] * processes, finished.text
    return finished


def assert_one_line(finished: Finished, *parts: str) -> None:
    """Check that a run has ended, on every rank, with one line of a user's error, which holds ``parts``."""
    message = "".join(finished.errors)
    assert finished.codes == [2] * len(finished.codes), finished.text
    assert message.startswith("error: ") and message.count("\n") == 1, finished.text
    for part in parts:
        assert part in message, message


def records(path: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of one kind in a run's JSON lines."""
    return [record for line in path.read_text().splitlines() if (record := json.loads(line))["kind"] == kind]


def _work(
    rank: int,
    world_size: int,
    port: int,
    argv: list[str],
    folder: Path,
    main: Callable[[], None],
    manager: SyncManager,
) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"rank{rank}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    become_rank(rank, world_size, port)
    filesystem_async._results_queue = manager.Queue()
    sys.argv = ["pretrain_dwm.py", *argv]
    main()
