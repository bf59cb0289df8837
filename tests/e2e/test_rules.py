"""Weights that follow a rule, as modes of the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.datasets import TOKENIZER, counting, make_dataset, noise
from tests.e2e.launch import pretrain, records, succeed
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, WEIGHTING

PLAIN = {**LANGUAGE_MODEL, **TRAINING}
SHUFFLED = {**WEIGHTING, "--dwm-init-from": "random", "--dwm-hidden-size": 16, "--dwm-num-attention-heads": 2}


def rule(name: str) -> dict[str, Any]:
    return {"--dwm-mode": "rule", "--dwm-rule": name}


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    good, bad = (make_dataset(folder, "good", counting(1)), make_dataset(folder, "bad", noise(2)))
    return ["0.5", good, "0.5", bad]


def test_an_oracle_trains_on_its_sources_alone(blend: list[str], tmp_path: Path):
    flags = {**PLAIN, **TOKENIZER, "--train-data-path": blend, "--data-cache-path": tmp_path / "cache"}
    metrics = tmp_path / "metrics.jsonl"
    succeed(tmp_path / "log", 2, {**flags, **rule("oracle"), "--dwm-rule-sources": "good", "--metrics-jsonl": metrics})
    steps = records(metrics, "train")
    assert len(steps) == 10
    for step in steps:
        weights = step["weight_by_source"]
        assert weights.get("good", 1.0) >= 1.0
        if "good" in weights and "bad" in weights:
            assert weights["bad"] == 0.0 and step["share_by_source"]["bad"] == 0.0


def test_an_unknown_source_is_named_with_those_that_are_there(blend: list[str], tmp_path: Path):
    flags = {**PLAIN, **TOKENIZER, "--train-data-path": blend, "--data-cache-path": tmp_path / "cache"}
    finished = pretrain(tmp_path / "log", 2, {**flags, **rule("oracle"), "--dwm-rule-sources": "goood"})
    assert finished.codes == [2, 2], finished.text
    message = "".join(finished.errors)
    assert message.startswith("error: --dwm-rule-sources goood") and "good, bad" in message and message.count("\n") == 1


def test_random_weights_are_the_same_in_a_resumed_run_and_in_another_layout(tmp_path: Path):
    """Rules that pass samples through the model are held against each other in tests/distributed/test_rules.py."""
    flags = {**PLAIN, **DATA, **rule("random"), "--train-iters": 8, "--dwm-rule-strength": 0.5}

    def weights(folder: str) -> list[float]:
        return [step["effective_sample_size"] for step in records(tmp_path / folder / "metrics.jsonl", "train")]

    succeed(tmp_path / "log1", 1, {**flags, "--save": tmp_path / "whole"})
    succeed(tmp_path / "log2", 1, {**flags, "--save": tmp_path / "parts", "--exit-interval": 3})
    succeed(tmp_path / "log3", 1, {**flags, "--save": tmp_path / "parts", "--load": tmp_path / "parts"})
    assert weights("parts") == weights("whole")
    assert len(weights("whole")) == 8 and all(0.3 < size < 1.0 for size in weights("whole"))
    succeed(tmp_path / "log4", 2, {**flags, "--save": tmp_path / "dp2"})
    assert weights("dp2") == weights("whole")


def test_shuffled_weights_are_those_of_a_learning_weighter_in_another_order(tmp_path: Path):
    flags = {**PLAIN, **DATA, **SHUFFLED}
    succeed(tmp_path / "log", 2, {**flags, **rule("shuffled"), "--metrics-jsonl": tmp_path / "metrics.jsonl"})
    updates = records(tmp_path / "metrics.jsonl", "outer_update")
    assert len(updates) == 4
    spread = [max(update["samples"]["weight"]) - min(update["samples"]["weight"]) for update in updates]
    assert spread[0] == 0 and spread[-1] > 0  # it learns
