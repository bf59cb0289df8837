"""``benchmarks/gpu.sh`` and what it is made of, at a size for a CPU."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_dwm.benchmarks import precision
from megatron_dwm.benchmarks.gpu_report import figure, ratios_to_plain, tables
from tests.e2e.launch import pretrain
from tests.paths import ROOT
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING

PRECISION: dict[str, Any] = {
    **LANGUAGE_MODEL,
    **TRAINING,
    **DATA,
    **{"--bf16": True, "--num-layers": 2, "--init-method-std": 0.1, "--eval-iters": 0, "--global-batch-size": 16},
    **{"--dwm-num-stages": 1, "--dwm-hidden-size": 8, "--dwm-num-attention-heads": 1, "--steps": 4, "--batches": 2},
}


GPU = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def gpu(preloaded_commands: Path) -> GPU:
    """The script; takes its arguments."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = ["bash", "benchmarks/gpu.sh", *map(str, arguments)]
        environment = {**os.environ, "PYTHON": str(preloaded_commands / "python")}
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)

    return run


def test_a_part_is_measured_once_and_reported(gpu: GPU, tmp_path: Path):
    command = ["--size", "tiny", "--parts", "costs-125m", "--output", tmp_path]
    finished = gpu(*command)
    assert finished.returncode == 0, finished.stderr
    figures = json.loads((tmp_path / "costs-125m.json").read_text())
    assert figures["device"] and figures["training_flops"] > 0 and figures["parameters"] > 0
    assert {name: len(turns) for name, turns in figures["turns"].items()} == dict.fromkeys(
        ("plain", "bare", "frozen", "updating"), 2
    )
    ways = {"exact": 2, "single-sample": 2, "finite-difference": 2}
    assert {way: len(turns) for way, turns in figures["update_seconds"].items()} == ways
    (planned,), measured = figures["plan"]["memory"], figures["peak_memory"]
    assert planned["weights"] == measured["parameter_copy_bytes"]
    assert planned["gradients"] == measured["gradient_copy_bytes"]
    reads = {mode: counts["scalar_reads"] for mode, counts in figures["device_counts"].items()}
    assert 0 < reads["bare"] <= reads["plain"] <= reads["frozen"] < reads["updating"]
    turns = figures["turns"]
    slower, frozen = ratios_to_plain(figures, 2)[0], ratios_to_plain(figures, None)[0]
    assert frozen == turns["plain"][0] / turns["frozen"][0]
    assert slower == pytest.approx(2 * turns["plain"][0] / (turns["frozen"][0] + turns["updating"][0]))
    for text in ("megatron-core alone", "an update every 100 (computed)", "Peak memory", "by --plan", "scalars read"):
        assert text in finished.stdout, text
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")

    (tmp_path / "gpu.png").unlink()
    again = gpu(*command, "--report")
    assert again.returncode == 0 and finished.stdout.endswith(again.stdout) and "Time, on" in again.stdout
    assert (tmp_path / "gpu.png").is_file()


def test_alignments_in_bf16_against_fp32(tmp_path: Path):
    file = tmp_path / "precision.json"
    finished = pretrain(tmp_path / "log", 1, {**PRECISION, "--json": file}, precision.main)
    assert finished.codes == [0], finished.text
    figures = json.loads(file.read_text())
    agreement = figures["agreement"]
    assert len(agreement) == 12
    for preconditioner in ("adam", "none"):
        itself = agreement[f"fp32 exact, preconditioner {preconditioner}"]
        assert itself["relative_error"] == 0 and itself["correlation"] == pytest.approx(1)
        assert len(figures["alignments"][f"bf16 exact, preconditioner {preconditioner}"]) == 2 * 16
        in_bf16 = agreement[f"bf16 exact, preconditioner {preconditioner}"]
        assert in_bf16["correlation"] > 0.95 and 0 < in_bf16["relative_error"] < 0.2, in_bf16
    assert agreement["fp32 finite-difference, preconditioner none"]["correlation"] > 0.99
    results = {"precision": figures}
    assert "bf16 finite-difference, preconditioner adam" in tables(results)
    assert len(figure(results).axes) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"--bf16": False}, ["--bf16"]), ({"--steps": 9}, ["--train-iters 10", "--steps 9"])],
)
def test_a_run_without_something_to_compare_is_refused(changes: dict[str, Any], words: list[str], tmp_path: Path):
    finished = pretrain(tmp_path / "log", 1, {**PRECISION, **changes}, precision.main)
    assert finished.codes == [2]
    last = finished.errors[0].splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), finished.text
