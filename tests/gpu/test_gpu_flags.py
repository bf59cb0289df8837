"""Flags that act on a GPU alone: a small run with each, as a user starts it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dwm.runtime.rendezvous import free_port
from tests.paths import ROOT
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, as_argv

RUN: dict[str, Any] = {
    **LANGUAGE_MODEL,
    **TRAINING,
    **DATA,
    "--dwm-mode": "off",
    "--train-iters": 4,
    "--log-interval": 2,
}
RUN |= {"--lr-warmup-iters": 0, "--bf16": True, "--eval-iters": 0}
WEIGHTED = {
    "--dwm-mode": "bilevel",
    "--dwm-warmup-iters": 1,
    "--dwm-num-stages": 1,
    "--dwm-update-interval": 1,
    "--dwm-num-layers": 1,
    "--dwm-preconditioner": "none",  # Adam's would enlarge what is hardly more than rounding
    "--hidden-dropout": 0,
    "--attention-dropout": 0,
}
LARGER = {"--hidden-size": 256, "--num-attention-heads": 4, "--seq-length": 256, "--max-position-embeddings": 256}


def pretrain(folder: Path, flags: dict[str, Any], processes: int = 1) -> tuple[str, list[float]]:
    """Return the output and the losses of a run on GPUs."""
    return _pretrain(folder, flags, processes, "train", "lm_loss")


def first_alignments(folder: Path, flags: dict[str, Any], processes: int = 1) -> np.ndarray:
    """Return the alignments of a run's first outer update."""
    _, samples = _pretrain(folder, {**flags, **WEIGHTED}, processes, "outer_update", "samples")
    return np.array(samples[0]["alignment"])


def _pretrain(folder: Path, flags: dict[str, Any], processes: int, kind: str, field: str) -> tuple[str, list[Any]]:
    metrics = folder / "metrics.jsonl"
    command = [sys.executable, "pretrain_dwm.py", "--nproc", str(processes), *as_argv({**RUN, **flags})]
    environment = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    environment.pop("CUDA_VISIBLE_DEVICES")
    finished = subprocess.run(
        [*command, "--metrics-jsonl", str(metrics)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return finished.stdout, [record[field] for record in records if record["kind"] == kind]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.usefixtures("one_gpu")
def test_the_detector_of_stragglers_reports_with_every_line(tmp_path: Path):
    output, _ = pretrain(tmp_path, {"--log-straggler": True, "--straggler-ctrlr-port": free_port()})
    assert len(re.findall(r"MnRtt/Rnk: .*MxEtpt/Rnk: [\d.]+TF/0", output)) == 2


@pytest.mark.usefixtures("three_gpus")
def test_the_detector_of_stragglers_lists_as_many_ranks_as_asked_for(tmp_path: Path):
    flags = {"--log-straggler": True, "--straggler-ctrlr-port": free_port(), "--straggler-minmax-count": 2}
    output, _ = pretrain(tmp_path, {**flags, "--global-batch-size": 6}, processes=3)  # fewer than all, or it lists none
    assert output.count("Bottom 2 Ranks") == output.count("Top    2 Ranks") == 2


@pytest.mark.usefixtures("one_gpu")
def test_the_detector_of_stragglers_can_begin_turned_off(tmp_path: Path):
    flags = {"--log-straggler": True, "--straggler-ctrlr-port": free_port(), "--disable-straggler-on-startup": True}
    output, _ = pretrain(tmp_path, flags)
    assert "MnRtt/Rnk" not in output


@pytest.mark.usefixtures("one_gpu")
def test_memory_is_logged_and_recorded(tmp_path: Path):
    flags = {"--log-memory-interval": 2, "--log-device-memory-used": True, "--train-iters": 8}
    board, snapshot = tmp_path / "board", tmp_path / "snapshot.pickle"
    flags |= {"--log-memory-to-tensorboard": True, "--tensorboard-dir": board}
    flags |= {"--record-memory-history": True, "--memory-snapshot-path": snapshot}
    output, _ = pretrain(tmp_path, flags)
    reports = re.findall(r"\(after (\d+) iterations\) memory \(MB\) \| .*total device memory used: [\d.]+", output)
    assert reports == ["1", "2", "4", "6", "8"]  # without the interval, only the first two lines of the log have one
    assert snapshot.stat().st_size > 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(board)).Reload()
    assert [event.step for event in events.Scalars("mem-allocated-bytes")] == list(range(1, 9))


@pytest.mark.usefixtures("one_gpu")
def test_energy_is_logged(tmp_path: Path):
    output, _ = pretrain(tmp_path, {"--log-energy": True})
    assert re.search(r"energy per GPU \(J/iter/GPU\): [\d.]+ \| power per GPU \(W/GPU\): [\d.]+ \|", output)
    assert re.search(r"Total training energy \(GPU\): [\d.]+ MJ", output)


@pytest.mark.usefixtures("two_gpus", "transformer_engine")
def test_overlapped_communication_computes_the_same(tmp_path: Path):
    flags = {**LARGER, "--tensor-model-parallel-size": 2, "--sequence-parallel": True}
    flags["--transformer-impl"] = "transformer_engine"
    _, expected = pretrain(tmp_path / "plain", flags, processes=2)
    _, found = pretrain(tmp_path / "overlapped", {**flags, "--tp-comm-overlap": True}, processes=2)
    assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.usefixtures("one_gpu", "transformer_engine")
def test_parameters_in_fp8_train_as_those_in_bf16(tmp_path: Path):
    flags = {**LARGER, "--transformer-impl": "transformer_engine", "--use-distributed-optimizer": True}
    _, expected = pretrain(tmp_path / "bf16", flags)
    fp8 = {"--fp8-format": "hybrid", "--fp8-recipe": "tensorwise", "--fp8-param-gather": True}
    _, found = pretrain(tmp_path / "fp8", {**flags, **fp8})
    assert found == pytest.approx(expected, rel=5e-2)  # FP8 keeps 3 bits of a number, and products average over 256
    assert found != expected


@pytest.mark.usefixtures("one_gpu", "transformer_engine")
def test_outer_updates_in_fp8_align_as_those_in_bf16(tmp_path: Path):
    flags = {**LARGER, "--transformer-impl": "transformer_engine", "--use-distributed-optimizer": True}
    expected = first_alignments(tmp_path / "bf16", flags)
    found = first_alignments(tmp_path / "fp8", {**flags, "--fp8-format": "hybrid", "--fp8-recipe": "tensorwise"})
    assert 0 < relative_error(found, expected) < 0.3  # gradients keep 2 bits


@pytest.mark.usefixtures("two_gpus", "transformer_engine")
def test_outer_updates_with_overlapped_communication_align_the_same(tmp_path: Path):
    flags = {**LARGER, "--tensor-model-parallel-size": 2, "--sequence-parallel": True, "--micro-batch-size": 1}
    flags["--transformer-impl"] = "transformer_engine"
    expected = first_alignments(tmp_path / "plain", flags, processes=2)
    found = first_alignments(tmp_path / "overlapped", {**flags, "--tp-comm-overlap": True}, processes=2)
    assert relative_error(found, expected) < 0.1
