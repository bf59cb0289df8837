"""Datasets are built on every rank, those that read none included."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.datasets import TOKENIZER, counting, make_dataset
from tests.e2e.launch import records, succeed
from tests.small_runs import LANGUAGE_MODEL, TRAINING


@pytest.mark.parametrize("blend", [["{first}"], ["{first}", "{second}"], ["0.5", "{first}", "0.5", "{second}"]])
def test_one_dataset_and_blends_are_built_under_tensor_parallelism(blend: list[str], tmp_path: Path):
    prefixes = {name: make_dataset(tmp_path, name, counting(seed)) for seed, name in enumerate(("first", "second"))}
    flags = {
        **LANGUAGE_MODEL,
        **{**TRAINING, "--train-iters": 2, "--lr-warmup-iters": 0},
        **TOKENIZER,
        **{"--data-path": [word.format(**prefixes) for word in blend], "--split": "80,10,10"},
        **{"--tensor-model-parallel-size": 2, "--dwm-mode": "off", "--data-cache-path": tmp_path / "cache"},
    }
    metrics = tmp_path / "metrics.jsonl"
    succeed(tmp_path / "log", 2, {**flags, "--metrics-jsonl": metrics})
    assert len(records(metrics, "train")) == 2
