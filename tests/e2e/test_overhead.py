"""``benchmarks/overhead.py`` as a user starts it: its figures are there, and those that do not depend on time hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_dwm.benchmarks import overhead
from megatron_dwm.benchmarks.overhead_report import PARTS, targets
from tests.e2e.launch import Finished, pretrain
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, WEIGHTING

FLAGS = {
    **LANGUAGE_MODEL,
    **TRAINING,
    **DATA,
    **WEIGHTING,
    # Parameters outweigh activations, which could hide the copies, and the weighter is small.
    **{"--num-layers": 2, "--hidden-size": 128, "--seq-length": 8, "--micro-batch-size": 1, "--eval-iters": 0},
    **{"--dwm-init-from": "random", "--dwm-ngram-buckets": 64},
    **{"--train-iters": 60, "--global-batch-size": 4, "--steps": 2, "--repeats": 1, "--intervals": [2, 16]},
    # A data loader's worker ignores the signal by which Python ends it; the program must end nevertheless.
    "--num-workers": 1,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "TP2, sequence parallel": (
        2,
        {"--tensor-model-parallel-size": 2, "--sequence-parallel": True, "--micro-batch-size": 2},
    ),
}


def measure(folder: Path, processes: int, changes: dict[str, Any]) -> Finished:
    return pretrain(folder, processes, {**FLAGS, **changes}, overhead.main)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_figures_of_a_small_model(layout: str, tmp_path: Path):
    processes, flags = LAYOUTS[layout]
    finished = measure(tmp_path / "log", processes, {**flags, "--json": tmp_path / "figures.json"})
    assert finished.codes == [0] * processes, finished.text
    figures = json.loads((tmp_path / "figures.json").read_text())

    for name in (
        "plain_tokens_per_s",
        "bare_ratio",
        "frozen_ratio",
        "bilevel_ratio",
        "bilevel_ratio_of_whole_intervals",
    ):
        assert isinstance(figures[name], float) and figures[name] > 0, name
    assert figures["update_interval"] == 2

    for kind in ("measured", "theoretical"):
        assert list(figures["shares"][kind]) == list(PARTS)
        assert sum(figures["shares"][kind].values()) == pytest.approx(1)
    assert min(figures["shares"]["measured"].values()) > 0
    assert set(figures["passes"]) == {"alignment pass", "forward-backward"}
    found = {target.name: target for target in targets(figures)}
    by_operations = found["bilevel against plain, throughput, an update every 2"].by_operations
    assert figures["shares"]["theoretical"]["training step"] == pytest.approx(by_operations)
    assert by_operations is not None and by_operations < 1

    memory = figures["peak_memory"]
    assert memory["gradient_copy_bytes"] == memory["parameter_copy_bytes"]
    assert memory["plain_step_bytes"] > 0
    assert memory["outer_update_above_plain_bytes"] == memory["outer_update_bytes"] - memory["plain_step_bytes"]
    assert memory["exact"] == (processes == 1)
    if memory["exact"]:
        assert 0.5 <= memory["outer_update_above_plain_copies"] <= 1
        for name in ("weighted_step_above_plain_bytes", "retained_after_update_bytes"):
            assert 0 <= memory[name] < 0.001 * memory["parameter_copy_bytes"]
    assert memory["replay_bytes"] > 0 and memory["weighter_bytes"] > 0

    for target in targets(figures):
        assert str(target) in finished.output[0]


def test_sizes_of_microbatches_are_measured_one_after_the_other(preloaded_commands: Path, tmp_path: Path):
    found = tmp_path / "figures.json"
    flags = {**FLAGS, "--steps": 1, "--micro-batch-sizes": [2], "--clock": "processor", "--json": found}

    def main() -> None:
        sys.executable = str(preloaded_commands / "python")  # for the process of each size
        overhead.main()

    finished = pretrain(tmp_path / "log", 1, flags, main)
    assert finished.codes == [0], finished.text
    (figures,) = json.loads(found.read_text())["runs"]
    assert (figures["micro_batch_size"], figures["clock"]) == (2, "processor")
    for target in targets(figures):
        assert str(target) in finished.output[0]


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no update": ({"--dwm-mode": "off"}, ["--dwm-mode off", "leave the flag out"]),
    "no steps": ({"--steps": 0}, ["--steps 0", "at least 1"]),
    "too short a run": ({"--repeats": 100}, ["--train-iters 60", "--repeats 100", "raise the former"]),
    "no folder": ({"--json": "missing/figures.json"}, ["--json missing/figures.json", "does not exist"]),
    "no interval": ({"--intervals": 0}, ["--intervals 0", "at least 1"]),
    "unknown flag": ({"--repeat": 3}, ["unknown flag --repeat"]),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_is_one_line(mistake: str, tmp_path: Path):
    changes, words = BAD[mistake]
    finished = measure(tmp_path / "log", 1, changes)
    assert finished.codes == [2]
    last = finished.errors[0].splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), finished.text
    assert "Traceback" not in finished.text
