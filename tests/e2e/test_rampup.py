"""Batches that grow: weights are relative to the batch of the step, and updates, replay and records follow."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.datasets import TOKENIZER, counting, make_dataset, noise
from tests.e2e.launch import records, succeed
from tests.small_runs import LANGUAGE_MODEL, TRAINING, WEIGHTING

SIZES = [4] * 5 + [8] * 3 + [12] * 3
"""Of 80 samples: from 4 to 12, by 4 after every 20 of the first 40."""


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rampup")
    train = ["0.5", make_dataset(folder, "clean", counting(0)), "0.5", make_dataset(folder, "noise", noise(1))]
    return {
        **LANGUAGE_MODEL,
        **TRAINING,
        **TOKENIZER,
        **WEIGHTING,
        "--train-iters": False,
        "--train-samples": 80,
        "--lr-warmup-iters": False,
        "--micro-batch-size": 2,
        "--global-batch-size": 12,
        "--rampup-batch-size": [4, 4, 40],
        "--adam-eps": 1e-4,
        "--make-vocab-size-divisible-by": 32,
        "--dwm-warmup-iters": 2,
        "--dwm-num-stages": 1,
        "--dwm-replay": 3,
        "--dwm-weighter-steps": 3,
        "--hidden-dropout": 0,
        "--attention-dropout": 0,
        "--train-data-path": train,
        "--dwm-target-data-path": make_dataset(folder, "target", counting(2)),
        "--eval-iters": 0,
    }


def figures(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = records(folder / "metrics.jsonl", kind)
    return [{key: value for key, value in record.items() if key != "seconds"} for record in found]


@pytest.fixture(scope="module")
def whole(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    finished = succeed(folder / "out", 1, {**flags, "--save": folder})
    lines = [line for line in finished.text.splitlines() if "global batch size:" in line]
    logged = [int(line.split("global batch size:")[1].split("|")[0]) for line in lines]
    assert logged == SIZES
    return folder


def test_weights_are_relative_to_the_batch_of_the_step(whole: Path):
    assert [record["consumed_samples"] for record in figures(whole, "train")] == list(accumulate(SIZES))
    updates = figures(whole, "outer_update")
    assert [len(update["samples"]["weight"]) for update in updates] == [
        SIZES[update["iteration"] - 1] for update in updates
    ]
    assert len({len(update["samples"]["weight"]) for update in updates}) == 3
    for update in updates:
        samples = update["samples"]
        assert sum(samples["weight"]) == pytest.approx(len(samples["weight"]))
        first = sum(SIZES[: update["iteration"] - 1])
        assert samples["index"] == [*range(first, first + len(samples["index"]))]


def test_a_run_that_stops_while_its_batches_grow_goes_on_as_if_it_had_not(
    flags: dict[str, Any], whole: Path, tmp_path: Path
):
    run = {**flags, "--save": tmp_path, "--load": tmp_path}
    succeed(tmp_path / "1", 1, {**run, "--exit-interval": 7})
    succeed(tmp_path / "2", 1, run)
    for kind in ("train", "outer_update"):
        assert figures(tmp_path, kind) == figures(whole, kind)


def test_replicas_divide_every_batch(flags: dict[str, Any], whole: Path, tmp_path: Path):
    succeed(tmp_path / "out", 2, {**flags, "--save": tmp_path})
    for ours, theirs in zip(figures(tmp_path, "train"), figures(whole, "train"), strict=True):
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=1e-4)
    for ours, theirs in zip(figures(tmp_path, "outer_update"), figures(whole, "outer_update"), strict=True):
        assert ours["samples"]["index"] == theirs["samples"]["index"]
        assert ours["samples"]["weight"] == pytest.approx(theirs["samples"]["weight"], rel=1e-2)
