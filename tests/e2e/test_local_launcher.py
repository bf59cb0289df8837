"""``--nproc``: ranks of one machine, whose error is the last line on the screen."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dwm.config.flags import split
from megatron_dwm.config.start import StartConfig
from megatron_dwm.errors import UserError
from tests.e2e.launch import records
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, as_argv

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def launch(preloaded_commands: Path, tmp_path: Path) -> Launch:
    """A run on two processes, started in an empty folder; takes flags of its own."""

    def run(**changes: object) -> subprocess.CompletedProcess[str]:
        flags = {**LANGUAGE_MODEL, **TRAINING, **DATA, "--dwm-mode": "off", "--train-iters": 6, **changes}
        command = [preloaded_commands / "megatron-dwm", "pretrain", "--nproc", "2", *as_argv(flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

    return run


def test_a_run_from_any_folder(launch: Launch, tmp_path: Path):
    finished = launch(**{"--tensor-model-parallel-size": 2, "--metrics-jsonl": tmp_path / "metrics.jsonl"})
    assert finished.returncode == 0, finished.stderr
    assert len(records(tmp_path / "metrics.jsonl", "train")) == 6


def test_a_users_error_is_the_last_line_and_the_exit_code_is_2(launch: Launch):
    finished = launch(**{"--lr": -3})
    assert finished.returncode == 2, finished.stderr
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("error: --lr -3") and finished.stderr.count("error: ") == 1, finished.stderr


@pytest.mark.parametrize("text", ["0", "x", "-1", "", "²", "9" * 5000])
def test_a_number_of_processes_that_is_none_is_refused(text: str):
    with pytest.raises(UserError, match="--nproc"):
        split(["--lr", "1", "--nproc", text], StartConfig)
    assert split(["--lr", "1", "--nproc=3", "--bf16"], StartConfig) == (StartConfig(3), ["--lr", "1", "--bf16"])
