"""A run that is asked to stop saves, says so in its status, and ends; submitted again it goes on as if undisturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dwm.runtime.process_groups import free_port
from tests.e2e.launch import records, succeed
from tests.e2e.test_uniform_weights import assert_same_checkpoints
from tests.paths import ROOT
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, WEIGHTING
from tests.turns import turn

# Data loader processes are what is default; they get the signal, too.
FLAGS = {
    **LANGUAGE_MODEL,
    **TRAINING,
    **DATA,
    **WEIGHTING,
    **{"--num-workers": 2, "--train-iters": 40, "--eval-interval": 20, "--exit-signal-handler": True},
    "--save-interval": 8,
}
DISTRIBUTED = {"--use-distributed-optimizer": True, "--dist-ckpt-optim-fully-reshardable": True}


def start(folder: Path, save: Path, processes: int, **changes: object) -> list[subprocess.Popen[str]]:
    """Start the command on ``processes`` ranks, each in a session of the same process group as its workers."""
    flags = {**FLAGS, "--save": save, "--load": save, **changes}
    argv = [str(word) for name, value in flags.items() for word in ([name] if value is True else [name, value])]
    port, started = free_port(), []
    for rank in range(processes):
        environment = {
            **os.environ,
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)},
        }
        log = (folder / f"rank{rank}.log").open("a")
        command = [sys.executable, str(ROOT / "pretrain_dwm.py"), *argv]
        started.append(
            subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )
        )
    return started


def wait_for_iteration(metrics: Path, iteration: int, ranks: list[subprocess.Popen[str]]) -> None:
    while not metrics.is_file() or len(records(metrics, "train")) < iteration:
        assert all(rank.poll() is None for rank in ranks), "the run ended before it was signaled"
        time.sleep(0.05)


@pytest.mark.usefixtures("all_mock_data")
def test_a_signal_to_every_process_of_a_run_loses_nothing(tmp_path: Path):
    number, processes = signal.SIGTERM, 2
    save = tmp_path / "interrupted"
    with turn(processes):
        ranks = start(tmp_path, save, processes, **DISTRIBUTED)
        wait_for_iteration(save / "metrics.jsonl", 10, ranks)
        for rank in ranks:
            os.killpg(rank.pid, number)  # the loaders' processes as well, as SLURM does
        codes = [rank.wait() for rank in ranks]
        log = "".join(path.read_text() for path in tmp_path.glob("*.log"))
        assert codes == [0] * processes, log
        assert "Warning" not in log and "Overwriting" not in log, log
        status = json.loads((save / "run_status.json").read_text())
        assert status["status"] == "interrupted" and number.name in status["reason"], status
        assert 10 <= status["iteration"] < 40
        assert (save / f"iter_{status['iteration']:07d}" / "metadata.json").is_file()

    succeed(tmp_path / "resumed", processes, {**FLAGS, **DISTRIBUTED, "--save": save, "--load": save})
    assert json.loads((save / "run_status.json").read_text())["status"] == "finished"
    whole = tmp_path / "whole"
    succeed(tmp_path / "log", processes, {**FLAGS, **DISTRIBUTED, "--save": whole})
    assert_same_checkpoints(whole / "iter_0000040", save / "iter_0000040")


def test_a_run_is_finished_when_it_has_trained_and_evaluated(tmp_path: Path):
    """One that ends after its last iteration, before the evaluation that follows, has more to do."""
    save = tmp_path / "save"
    flags = {**FLAGS, "--num-workers": 0, "--train-iters": 12, "--exit-interval": 6, "--save": save, "--load": save}
    found = []
    for _ in range(3):
        succeed(tmp_path / "log", 1, flags)
        status = json.loads((save / "run_status.json").read_text())
        evaluated = [record["split"] for record in records(save / "metrics.jsonl", "evaluation")]
        found.append((status["status"], status["iteration"], evaluated))
    assert found == [("interrupted", 6, []), ("interrupted", 12, []), ("finished", 12, ["valid", "test"])]
