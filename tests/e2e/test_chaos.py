"""benchmarks/chaos.py, its shortest form: a run that is killed and starved ends as one that was left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dwm.benchmarks import chaos
from tests.turns import several_processes

SEED = 4  # of which the first two kinds are these


def test_a_run_survives_a_kill_and_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    file = tmp_path / "chaos.json"
    flags = ["--times", "2", "--seed", str(SEED), "--layouts", "dp2", "--saves", "async"]
    with several_processes:
        chaos.main([*flags, "--output", str(tmp_path / "runs"), "--json", str(file)])
    (found,) = json.loads(file.read_text())
    assert [one["kind"] for one in found["disturbances"]] == ["kill one", "full disk"]
    assert found["runs"] >= 1 and found["faults"] == []
    assert all(one["seconds"] < chaos.BOUND_SECONDS and one["faults"] == [] for one in found["disturbances"])
    assert "2 disturbances, 0 faults" in capsys.readouterr().out
