"""Weights of samples by exported weighters: those of training, relative to the reference samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from megatron_dwm.analysis.report.documents import exports, weights_over_time
from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.weighting.export_manifest import write_manifest
from megatron_dwm.weighting.weighter import Weighter
from megatron_dwm.weighting.weights import weights_from_scores

SIZES = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEMPERATURE = 0.5


def test_weights_are_those_of_training_with_the_reference_as_the_batch(tmp_path: Path):
    torch.manual_seed(5)
    tokens = torch.randint(20, (6, 8))
    expected = []
    for iteration in (10, 20):
        model = LlamaForSequenceClassification(
            LlamaConfig(**SIZES, num_labels=1, pad_token_id=0, initializer_range=1.0)
        )
        folder = tmp_path / "weighter" / f"iter_{iteration:07d}"
        model.save_pretrained(folder)
        write_manifest(folder, {"iteration": iteration, "temperature": TEMPERATURE})
        scores = Weighter(model, WeightingConfig(dwm_mode="off"), torch.device("cpu")).score(tokens)
        in_batch = weights_from_scores(scores[2:], TEMPERATURE)
        others = torch.exp((scores[:2, None] - scores[2:]).double() / TEMPERATURE) * in_batch
        expected.append(torch.cat([others.mean(1), in_batch]))
    (tmp_path / "weighter" / "iter_0000030").mkdir()  # being written: without its manifest
    folders = exports(tmp_path)
    iterations, weights = weights_over_time(folders, tokens, reference=4)
    assert iterations == [10, 20] and weights.shape == (6, 2)
    assert torch.from_numpy(weights).T.flatten().tolist() == pytest.approx(torch.cat(expected).tolist(), rel=1e-5)
    assert weights[2:].mean(0) == pytest.approx([1.0, 1.0]) and weights.std() > 0.1
