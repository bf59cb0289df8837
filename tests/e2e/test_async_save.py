"""A run that is killed while a checkpoint is written in the background goes on from a whole one."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from megatron_dwm.cli import pretrain as pretrain_command
from tests.e2e.launch import pretrain, records, succeed
from tests.e2e.test_uniform_weights import assert_same_checkpoints
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, WEIGHTING

SAVES, KILLED_AT, END = 2, 4, 6
FLAGS: dict[str, Any] = {
    **LANGUAGE_MODEL,
    **TRAINING,
    **DATA,
    **WEIGHTING,
    "--train-iters": END,
    "--save-interval": SAVES,
    "--async-save": True,
    "--use-distributed-optimizer": True,
    # The other format also saves the buckets' padding, which is whatever lay in memory.
    "--dist-ckpt-optim-fully-reshardable": True,
}


def killed_while_it_writes(save: Path) -> Callable[[], None]:
    """The program, whose process is killed with its children as soon as shards of the second checkpoint show up.

    Should they have become the checkpoint before that is seen, it is killed then.
    """
    name = f"iter_{KILLED_AT:07d}"

    def watch() -> None:
        while not any(save.glob(f".{name}.partial/*.distcp")) and not (save / name).exists():
            time.sleep(1e-3)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        os.kill(os.getpid(), signal.SIGKILL)

    def main() -> None:
        watcher = threading.Thread(target=watch)
        watcher.start()
        pretrain_command.main()
        watcher.join()

    return main


def test_a_run_killed_while_it_saves_goes_on_as_if_it_had_not_been(tmp_path: Path):
    whole, save = tmp_path / "whole", tmp_path / "save"
    succeed(tmp_path / "log", 2, FLAGS | {"--save": whole})
    killed = pretrain(tmp_path / "log", 2, FLAGS | {"--save": save}, main=killed_while_it_writes(save))
    assert killed.codes == [-signal.SIGKILL] * 2, killed.text

    iteration = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert iteration in (SAVES, KILLED_AT)
    resumed = succeed(tmp_path / "log", 2, FLAGS | {"--save": save, "--load": save})
    assert f"[ t 1/1, p 1/1 ] at iteration {iteration}\n" in resumed.output[0]
    losses = [[record["lm_loss"] for record in records(folder / "metrics.jsonl", "train")] for folder in (whole, save)]
    assert len(losses[0]) == END and losses[1] == losses[0]
    assert_same_checkpoints(whole / f"iter_{END:07d}", save / f"iter_{END:07d}")
    assert not list(save.glob(".iter_*"))
    print(f"killed with iteration {iteration} as the latest checkpoint")
