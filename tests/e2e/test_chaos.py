"""benchmarks/chaos.py, its shortest form: a run of which a rank was killed ends as one that was left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dwm.benchmarks import chaos
from megatron_dwm.benchmarks.chaos_moments import Plan
from tests.small_runs import as_argv
from tests.turns import turn

PLAN = Plan(iterations=8, save_interval=4, warmup=2, update_interval=2)
SMALLER = {
    "--train-iters": PLAN.iterations,
    "--save-interval": PLAN.save_interval,
    "--dwm-warmup-iters": PLAN.warmup,
    "--num-layers": 1,
    "--num-workers": 0,
    "--eval-interval": PLAN.iterations,
}
SEED = 22  # whose first disturbance is a rank that is killed at the first outer update


def test_a_run_survives_a_killed_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which the benchmark sets
    monkeypatch.setattr(chaos, "PLAN", PLAN)
    file = tmp_path / "chaos.json"
    flags = {"--times": 1, "--seed": SEED, "--layouts": "dp2", "--saves": "async", "--json": file}
    with turn(2):
        chaos.main(as_argv({**flags, "--output": tmp_path / "runs", **SMALLER}))
    (found,) = json.loads(file.read_text())
    (disturbance,) = found["disturbances"]
    assert disturbance["kind"] == "kill one" and sorted(disturbance["codes"]) == [-9, 1]
    assert disturbance["seconds"] < chaos.BOUND_SECONDS and disturbance["faults"] == found["faults"] == []
    assert "1 disturbances, 0 faults" in capsys.readouterr().out
