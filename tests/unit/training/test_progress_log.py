"""``progress.txt`` of a run."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from megatron_dwm.training.progress_log import ProgressLog
from megatron_dwm.training.train_state import TrainState
from tests.unit.obstacles import OBSTACLES

STATE = TrainState(iteration=40, consumed_train_samples=2_000_000, num_floating_point_operations_so_far=9e15)


def fields(folder: Path) -> list[list[str]]:
    return [line.split("\t") for line in (folder / "progress.txt").read_text().splitlines()]


def test_the_lines_are_those_of_megatron_lm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    log = ProgressLog(tmp_path, world_size=2, sequence=1000)
    log.saved(STATE, is_async=False)
    log.deleted(20)
    log.saved(STATE, is_async=True)
    log.finished_async(40)
    started, saved, deleted, saving, finished = fields(tmp_path)
    for line in (started, saved, deleted, saving, finished):
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", line[0]) and line[1:3] == ["Job ID: 77", "# GPUs: 2"]
    assert started[3:] == ["Starting job"] and deleted[3:] == ["Deleted checkpoint", "Iteration: 20"]
    assert saved[3:5] == ["Saved checkpoint", "Iteration: 40"]
    assert saved[7:] == ["Floating-point operations: 9.00e+15", "Tokens (in billions): 2.00"]
    assert re.fullmatch(r"Job throughput: \d+\.\d TFLOP/s/GPU", saved[5])
    assert saving[3] == "Saving async checkpoint" and finished[3:] == ["Saved async checkpoint", "Iteration: 40"]


def test_the_cumulative_throughput_is_since_the_first_job_of_so_many_processes(tmp_path: Path):
    def line(hours: int, processes: int, event: str) -> str:
        return f"{datetime.now() - timedelta(hours=hours):%Y-%m-%d %H:%M:%S}\tJob ID: \t# GPUs: {processes}\t{event}\n"

    saved = "Saved checkpoint\tIteration: 9\tJob throughput: 1.0\tCumulative throughput: 1.0\t"
    lines = [
        line(9, 4, "Starting job"),
        line(8, 2, "Starting job"),  # of another run of two, before the last one of four
        line(7, 4, f"{saved}Floating-point operations: 1.80e+15\tTokens (in billions): 0.01"),
        line(2, 2, "Starting job"),
        "no line of this file\n",
        line(1, 2, "Starting job"),
    ]
    (tmp_path / "progress.txt").write_text("".join(lines))
    ProgressLog(tmp_path, world_size=2, operations=5e15).saved(STATE, is_async=False)
    (cumulative,) = re.findall(r"Cumulative throughput: (\d+\.\d) TFLOP", (tmp_path / "progress.txt").read_text())
    assert float(cumulative) == pytest.approx((9e15 - 1.8e15) / (2 * 3600 * 1e12 * 2), abs=0.06)


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    ProgressLog(tmp_path / "missing").saved(STATE, is_async=False)
    assert "progress.txt: cannot be written (No such file or directory); an entry is lost" in caplog.text


@pytest.mark.parametrize("kind", [kind for kind in OBSTACLES if kind != "file"])
def test_what_is_no_file_stops_nothing_and_is_said(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    OBSTACLES[kind](tmp_path / "progress.txt")
    ProgressLog(tmp_path).saved(STATE, is_async=False)
    assert "progress.txt: cannot be written (" in caplog.text and "an entry is lost" in caplog.text
