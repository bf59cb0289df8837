"""Operation counts are Megatron-LM's (``num_floating_point_operations`` of core_v0.16.1), recorded for some shapes."""

from __future__ import annotations

import pytest

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.model.flops import training_flops

RECORDED = [
    (
        "GPT-2 style",
        ModelConfig(12, 768, 12, seq_length=1024, max_position_embeddings=1024),
        50304,
        512,
        418398534107136,
    ),
    (
        "Llama style, untied",
        ModelConfig(
            24,
            1024,
            16,
            2752,
            seq_length=1024,
            max_position_embeddings=1024,
            swiglu=True,
            untie_embeddings_and_output_weights=True,
        ),
        32000,
        512,
        1137169901027328,
    ),
    (
        "group queries",
        ModelConfig(32, 4096, 32, 14336, 128, True, 8, 8192, 8192, swiglu=True),
        128256,
        1024,
        431765022088101888,
    ),
    ("heads wider than the model", ModelConfig(4, 256, 8, 1024, 64, True, 2, 2048, 2048), 1024, 8, 773094113280),
]


@pytest.mark.parametrize(("model", "vocab", "batch", "expected"), [case[1:] for case in RECORDED], ids=lambda value: "")
def test_a_training_step_counts_as_in_megatron_lm(model: ModelConfig, vocab: int, batch: int, expected: int):
    assert training_flops(model, vocab, batch) == pytest.approx(expected, rel=1e-12)
