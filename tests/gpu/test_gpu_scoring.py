"""Scores that GPUs compute in bf16 are those of the CPU, also with a GPU for each process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.classifiers import numbers, save_classifier_of_numbers
from tests.paths import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_classifier_of_numbers(tmp_path / "weighter")
    for name in ("a", "b"):
        rows = [{"text": numbers(number, 1 + number % 60), "file": name} for number in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def scores(folder: Path, workers: int, *, on_gpus: bool) -> list[float]:
    environment = dict(os.environ)
    if on_gpus:
        environment.pop("CUDA_VISIBLE_DEVICES")  # which hides them from the other tests
    output = folder / f"out-{workers}-{on_gpus}"
    command = [sys.executable, "tools/score_data.py", "--weighter", folder / "weighter", "--output", output]
    command += ["--input", folder / "a.jsonl", folder / "b.jsonl", "--workers", str(workers)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    files = sorted((output / "data").iterdir())
    return [json.loads(line)["score"] for file in files for line in file.read_text().splitlines()]


@pytest.mark.usefixtures("one_gpu")
def test_scores_in_bf16_are_those_of_the_cpu(folder: Path):
    expected = scores(folder, 1, on_gpus=False)
    found = scores(folder, 1, on_gpus=True)
    spread = max(expected) - min(expected)
    assert found == pytest.approx(expected, abs=0.05 * spread)  # bf16 has 8 bits, and errors of two layers add up
    assert found != expected


@pytest.mark.usefixtures("two_gpus")
def test_each_process_has_a_gpu_and_scores_alike(folder: Path):
    assert scores(folder, 2, on_gpus=True) == pytest.approx(scores(folder, 1, on_gpus=True), abs=1e-3)
