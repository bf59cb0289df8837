"""benchmarks/chaos.py, its shortest form: a run whose disk is full ends as one that was left alone.

Kills while a checkpoint is written are in test_async_save.py, signals in test_stop_request.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dwm.benchmarks import chaos
from tests.turns import several_processes

SEED = 3  # whose first disturbance is this one


def test_a_run_survives_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    file = tmp_path / "chaos.json"
    flags = ["--times", "1", "--seed", str(SEED), "--layouts", "dp2", "--saves", "async"]
    with several_processes:
        chaos.main([*flags, "--output", str(tmp_path / "runs"), "--json", str(file)])
    (found,) = json.loads(file.read_text())
    (disturbance,) = found["disturbances"]
    assert disturbance["kind"] == "full disk" and disturbance["codes"] == [2, 2]
    assert disturbance["seconds"] < chaos.BOUND_SECONDS and disturbance["faults"] == []
    assert found["runs"] == 1 and found["faults"] == []
    assert "1 disturbances, 0 faults" in capsys.readouterr().out
