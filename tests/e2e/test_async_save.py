"""A run that is killed while a checkpoint is written in the background goes on from a whole one."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_dwm.cli import pretrain as pretrain_command
from megatron_dwm.training import checkpoint
from megatron_dwm.weighting import export as exports
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


def failing_to_export(iteration: int, wait: Callable[[Path], None]) -> Callable[[], None]:
    """The program, whose weighter of this iteration finds no room; ``wait`` is called before a checkpoint is written.

    Args:
        wait: its argument is the folder that the checkpoint is written to.
    """
    write, export = checkpoint._write_with_checksums, exports.export_weighter

    def late(write_shards: Any, folder: Path, *args: Any) -> None:
        wait(folder)
        write(write_shards, folder, *args)

    def full(model: Any, save_tokenizer: Any, folder: Path, *args: Any, **options: Any) -> None:
        if folder.name == f"iter_{iteration:07d}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        export(model, save_tokenizer, folder, *args, **options)

    def main() -> None:
        checkpoint._write_with_checksums, exports.export_weighter = late, full
        pretrain_command.main()

    return main


def until_removed(folder: Path) -> None:
    """Wait until the folder is gone; so long that the run has failed by then."""
    deadline = time.monotonic() + 20
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("interval", "fails_at", "wait", "left"),
    [
        # The export of iteration 4 waits for the checkpoint of iteration 2.
        pytest.param(2, 4, lambda folder: time.sleep(1), ["iter_0000002"], id="before a save"),
        pytest.param(5, 6, until_removed, [], id="at the end of a stage"),
    ],
)
def test_an_export_that_fails_during_a_save_leaves_nothing_half_written(
    interval: int, fails_at: int, wait: Callable[[Path], None], left: list[str], tmp_path: Path
):
    flags = FLAGS | {"--save-interval": interval, "--save": tmp_path / "save", "--train-iters": 10}
    finished = pretrain(tmp_path / "log", 1, flags, main=failing_to_export(fails_at, wait))
    said = f"the weighter of iteration {fails_at} cannot be written (No space left on device)"
    assert finished.codes == [2] and said in finished.errors[0] and finished.errors[0].count("\n") == 1, finished.text
    assert [path.name for path in (tmp_path / "save").glob("*iter_*")] == left
