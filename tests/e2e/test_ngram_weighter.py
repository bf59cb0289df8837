"""The n-gram weighter in runs: it learns, is exported, serves frozen, and goes on with another batch size."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from tests.e2e.datasets import TOKENIZER, counting, make_dataset, noise
from tests.e2e.launch import records, succeed
from tests.small_runs import LANGUAGE_MODEL, TRAINING

WEIGHTING = {"--dwm-arch": "ngram", "--dwm-num-stages": 2, "--dwm-update-interval": 2}


def test_it_learns_is_exported_serves_frozen_and_goes_on_with_another_batch_size(tmp_path: Path):
    save = tmp_path / "save"
    data = {
        **TOKENIZER,
        "--train-data-path": [
            *("0.5", make_dataset(tmp_path, "clean", counting(0))),
            *("0.5", make_dataset(tmp_path, "noise", noise(1))),
        ],
    }
    target = {"--dwm-target-data-path": make_dataset(tmp_path, "target", counting(3))}
    run = {**LANGUAGE_MODEL, **TRAINING, "--train-iters": 20, **data}
    succeed(tmp_path / "log", 2, {**run, **WEIGHTING, **target, "--save": save})
    steps, updates = (records(save / "metrics.jsonl", kind) for kind in ("train", "outer_update"))
    both = [step["weight_by_source"] for step in steps if len(step["weight_by_source"]) == 2]
    assert sum(weights["clean"] > weights["noise"] for weights in both[-6:]) == 6
    assert len(updates) == 10 and all(update["objective_after"] < update["objective_before"] for update in updates)

    export = save / "weighter" / "iter_0000020"
    model = AutoModelForSequenceClassification.from_pretrained(export)
    assert model.config.model_type == "dwm_ngram"
    state = torch.load(save / "iter_0000020" / "dwm_state.pt", weights_only=True)
    assert torch.equal(state["weighter"]["embedding.weight"], model.embedding.weight)
    assert torch.equal(state["weighter"]["calibration.calibrated"], model.calibration.calibrated)
    assert model.calibration.scores[0] < model.calibration.scores[-1]
    assert len(state["replay"]) == 10 and all(len(entry["tokens"]) == 8 for entry in state["replay"])

    layout = {"--tensor-model-parallel-size": 2, "--train-iters": 6, "--metrics-jsonl": tmp_path / "frozen.jsonl"}
    succeed(tmp_path / "log", 2, {**run, **layout, "--dwm-mode": "frozen", "--dwm-load": export})
    first = records(tmp_path / "frozen.jsonl", "train")[0]
    assert first["weight_by_source"]["clean"] > first["weight_by_source"]["noise"]

    longer = {"--load": save, "--save": tmp_path / "longer", "--train-iters": 24, "--global-batch-size": 4}
    longer["--min-lr"] = 1e-3  # at a rate of zero the weighter learns nothing
    succeed(tmp_path / "log", 1, {**run, **WEIGHTING, **target, **longer, "--override-opt-param-scheduler": True})
    after = torch.load(tmp_path / "longer" / "iter_0000024" / "dwm_state.pt", weights_only=True)
    assert after["outer_updates"] == 12 and [len(entry["tokens"]) for entry in after["replay"]] == [8] * 10 + [4] * 2
    for before, kept in zip(state["replay"], after["replay"], strict=False):
        assert torch.equal(before["tokens"], kept["tokens"]) and torch.equal(before["alignments"], kept["alignments"])
