"""Features of pretraining, each with bi-level weighting on: the run ends well and the model learns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.datasets import TOKENIZER, counting, make_dataset, noise
from tests.e2e.launch import records, succeed
from tests.small_runs import LANGUAGE_MODEL, TRAINING, WEIGHTING

TP2 = {"--tensor-model-parallel-size": 2}
PP2 = {"--pipeline-model-parallel-size": 2}
GPT = {
    "--position-embedding-type": "learned_absolute",
    "--normalization": "LayerNorm",
    "--swiglu": False,
    "--disable-bias-linear": False,
    "--untie-embeddings-and-output-weights": False,
}
FEATURES: dict[str, tuple[int, dict[str, Any]]] = {
    "bf16, TP2 with sequence parallelism, distributed optimizer": (
        2,
        {**TP2, "--sequence-parallel": True, "--use-distributed-optimizer": True, "--bf16": True},
    ),
    "fp16": (1, {"--fp16": True, "--initial-loss-scale": 65536}),
    "interleaved pipeline, bf16": (
        2,
        {**PP2, "--num-layers": 4, "--num-virtual-stages-per-pipeline-rank": 2, "--bf16": True},
    ),
    "GPT-2 shape, tied, PP2, full recomputation": (
        2,
        {
            **GPT,
            **PP2,
            "--recompute-granularity": "full",
            "--recompute-method": "uniform",
            "--recompute-num-layers": 1,
        },
    ),
    "local layers, finite differences, grouped queries": (
        1,
        {
            "--transformer-impl": "local",
            "--dwm-alignment": "finite-difference",
            "--group-query-attention": True,
            "--num-query-groups": 2,
        },
    ),
    "documents apart, cyclic loading, DP2": (
        2,
        {
            "--reset-position-ids": True,
            "--reset-attention-mask": True,
            "--eod-mask-loss": True,
            "--dataloader-type": "cyclic",
        },
    ),
    "SGD, random weighter of another architecture": (
        1,
        {
            "--optimizer": "sgd",
            "--lr": 0.5,
            "--dwm-preconditioner": "none",
            "--dwm-init-from": "random",
            "--dwm-arch": "modernbert",
            "--dwm-hidden-size": 32,
        },
    ),
    "WSD schedule, samples instead of iterations": (
        1,
        {
            "--train-iters": False,
            "--train-samples": 80,
            "--lr-warmup-iters": False,
            "--lr-warmup-samples": 8,
            "--lr-decay-style": "WSD",
            "--lr-wsd-decay-samples": 20,
        },
    ),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_run_with_this_feature_learns(feature: str, tmp_path: Path):
    processes, changes = FEATURES[feature]
    sources = [make_dataset(tmp_path, "clean", counting(0)), make_dataset(tmp_path, "noise", noise(1))]
    flags = {
        **LANGUAGE_MODEL,
        **TRAINING,
        "--lr": 2e-2,  # enough to learn in ten iterations
        **TOKENIZER,
        **WEIGHTING,
        "--train-data-path": ["0.5", sources[0], "0.5", sources[1]],
        "--valid-data-path": make_dataset(tmp_path, "valid", counting(2)),
        "--dwm-target-data-path": make_dataset(tmp_path, "target", counting(3)),
        "--save": tmp_path / "save",
        "--tensorboard-dir": tmp_path / "board",
        **changes,
    }
    succeed(tmp_path / "log", processes, flags)
    metrics = tmp_path / "save" / "metrics.jsonl"
    losses = [record["lm_loss"] for record in records(metrics, "train")]
    assert len(losses) == 10 and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 0.3
    updates = records(metrics, "outer_update")
    assert len(updates) + len(records(metrics, "skipped_outer_update")) == 4 and len(updates) > 2
    assert set(updates[0]["samples"]["source"]) == {"clean", "noise"}
    assert updates[-1]["samples"]["weight"] != updates[0]["samples"]["weight"]
    assert (tmp_path / "save" / "weighter" / "iter_0000010" / "model.safetensors").is_file()
    assert list((tmp_path / "board").iterdir())
