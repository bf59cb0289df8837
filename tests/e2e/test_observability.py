"""What a run tells of itself besides its log line: timers, a profile, Weights & Biases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_dwm.runtime.timers import LEVEL_1_TIMERS, LEVEL_2_TIMERS
from tests.e2e.launch import Finished, records, succeed
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, WEIGHTING

PIPELINE = {**LANGUAGE_MODEL, **TRAINING, **DATA, "--pipeline-model-parallel-size": 2, "--log-interval": 2}


def curves(folder: Path) -> dict[str, list[int]]:
    """Return the iterations of each of TensorBoard's curves."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """A run that watches everything."""
    folder = tmp_path_factory.mktemp("watched")
    flags: dict[str, Any] = {
        **PIPELINE,
        **WEIGHTING,
        "--save": folder / "run",
        "--tensorboard-dir": folder / "board",
        "--timing-log-level": 2,
        "--log-throughput": True,
        "--log-timers-to-tensorboard": True,
        "--profile": True,
        "--use-pytorch-profiler": True,
        "--profile-ranks": 1,
        "--profile-step-start": 2,
        "--profile-step-end": 4,
        "--check-weight-hash-across-dp-replicas-interval": 5,
        "--empty-unused-memory-level": 2,
        "--log-progress": True,
        "--wandb-project": "tests",
        "--wandb-name": "watched",  # as forks spell --wandb-exp-name
        "--wandb-entity": "team",
        "--log-batch-size-to-tensorboard": True,
        "--no-log-loss-scale-to-tensorboard": True,
    }
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WANDB_MODE", "offline")
        return folder, succeed(folder / "out", 2, flags)


def test_weights_and_biases_keep_the_run_in_a_folder(run: tuple[Path, Finished]):
    (offline,) = (run[0] / "run" / "wandb" / "wandb").glob("offline-run-*")
    (written,) = offline.glob("run-*.wandb")
    assert b"watched" in written.read_bytes() and b"team" in written.read_bytes()


def test_some_iterations_are_profiled(run: tuple[Path, Finished]):
    (trace,) = (run[0] / "board").glob("*.pt.trace.json")
    names = trace.read_text()
    assert names.count('"ProfilerStep#') >= 2 and '"aten::mm"' in names
    assert json.loads(names)["distributedInfo"]["rank"] == 1


def test_replicas_are_compared(run: tuple[Path, Finished]):
    matches = [line for line in run[1].output[0].splitlines() if line.startswith(">>> Weight hashes match")]
    assert matches == [f">>> Weight hashes match after {iteration} iterations..." for iteration in (0, 5, 10)]


def test_the_log_has_the_timers_of_every_line(run: tuple[Path, Finished]):
    lines = run[1].output[1].splitlines()
    assert lines.count("(min, max) time across ranks (ms):") == 6  # of 10 iterations, and the first
    last = lines[len(lines) - lines[::-1].index("(min, max) time across ranks (ms):") :]
    named = [line.strip().split(" ...")[0] for line in last if line.startswith("    ")]
    expected = {"forward-backward", "optimizer", "optimizer-inner-step", "forward-compute", "dwm-weigh"}
    assert expected <= set(named)
    assert named == [name for name in (*LEVEL_1_TIMERS, *LEVEL_2_TIMERS) if name in named]  # in Megatron-LM's order


def test_tensorboard_has_the_timers(run: tuple[Path, Finished]):
    found = curves(run[0] / "board")
    assert found["forward-backward-time"] == found["throughput"] == [1, *range(2, 11, 2)]
    assert found["iteration-time"] == [*range(2, 11, 2)]
    assert "batch-size" in found and "loss-scale" not in found


def test_outer_updates_have_a_line_and_curves(run: tuple[Path, Finished]):
    updates = records(run[0] / "run" / "metrics.jsonl", "outer_update")
    (first, *_), lines = (
        updates,
        [line for line in run[1].output[1].splitlines() if "outer update at iteration" in line],
    )
    assert len(lines) == len(updates) > 2
    aligned = np.mean(first["samples"]["alignment"])
    assert first["alignment_by_source"] == {"mock": pytest.approx(aligned)}
    assert f"iteration {first['iteration']:8d} | target loss: {first['target_loss']:.6E} | objective: " in lines[0]
    assert lines[0].endswith(f" | alignment mock: {aligned:.4g} |")
    found = curves(run[0] / "board")
    for name in ("target_loss", "objective_before", "objective_after", "weighter_grad_norm", "alignment/mock"):
        assert found[f"dwm/{name}"] == [record["iteration"] for record in updates]


def test_progress_is_noted(run: tuple[Path, Finished]):
    noted = [line.split("\t")[2:5] for line in (run[0] / "run" / "progress.txt").read_text().splitlines()]
    assert noted == [["# GPUs: 2", "Starting job"], ["# GPUs: 2", "Saved checkpoint", "Iteration: 10"]]


def test_timers_change_no_number(run: tuple[Path, Finished], tmp_path: Path):
    succeed(tmp_path, 2, {**PIPELINE, **WEIGHTING, "--metrics-jsonl": tmp_path / "metrics.jsonl"})
    plain, timed = (
        [{key: value for key, value in record.items() if key != "seconds"} for record in records(path, "train")]
        for path in (tmp_path / "metrics.jsonl", run[0] / "run" / "metrics.jsonl")
    )
    assert plain == timed
