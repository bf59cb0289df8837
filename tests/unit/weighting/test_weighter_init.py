"""A weighter that is initialized at random has the sizes of the flags."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.weighting.weighter_init import random_weighter_model


@pytest.mark.parametrize("arch", ["llama", "gpt2", "modernbert"])
def test_a_transformer_has_the_sizes_of_the_flags(arch: Literal["llama", "gpt2", "modernbert"]):
    flags = WeightingConfig(
        dwm_arch=arch, dwm_num_layers=2, dwm_hidden_size=16, dwm_num_attention_heads=2, dwm_ffn_hidden_size=40
    )
    model = random_weighter_model(flags, vocab_size=50, seq_length=8, eod=0, seed=1)
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.num_attention_heads) == (2, 16, 2)
    outputs = [parameter for name, parameter in model.named_parameters() if "mlp" in name and parameter.dim() == 2]
    assert any(40 in weight.shape for weight in outputs) and not any(64 in weight.shape for weight in outputs)
    assert model(input_ids=torch.ones(1, 8, dtype=torch.long)).logits.shape == (1, 1)
