"""Small Hugging Face language models with random weights, one for each thing that an import has to get right."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_ROPE = {"rope_type": "default", "rope_theta": 5000.0}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-6, "rope_parameters": _ROPE},
    "llama with biases of attention, linear": {
        "model_type": "llama",
        "attention_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    },
    "llama with biases of the MLP, llama3": {
        "model_type": "llama",
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "head_dim": 64,
    },
    "mistral": {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
    "mistral, window": {"model_type": "mistral", "head_dim": 16, "sliding_window": 5},
    "qwen2, window in some layers": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3, window": {
        "model_type": "phi3",
        "sliding_window": 4,
        "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5},
    },
    "phi3, rotated whole, window": {"model_type": "phi3", "sliding_window": 4, "rope_parameters": _ROPE},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_parameters": _ROPE},
    "qwen2, yarn": {"model_type": "qwen2", "head_dim": 32, "rope_parameters": _YARN},
    "seed_oss": {
        "model_type": "seed_oss",
        "head_dim": 16,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "rope_parameters": _ROPE,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_parameters": _ROPE},
    "qwen3, yarn of other attention": {
        "model_type": "qwen3",
        "head_dim": 32,
        "rope_parameters": {**_YARN, "attention_factor": 1.25, "beta_fast": 4.0, "truncate": False},
    },
    "olmo2": {"model_type": "olmo2", "rope_parameters": _ROPE},
    "olmo2, wide heads, one group": {
        "model_type": "olmo2",
        "head_dim": 16,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_parameters": _ROPE,
    },
    "phi3": {"model_type": "phi3", "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}},
    "nemotron": {"model_type": "nemotron", "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 4},
}
"""Configurations by what is particular to them."""


def random_model(name: str, *, vocab_size: int, positions: int, dtype: torch.dtype = torch.float32) -> Any:
    """Return the model of :data:`MODELS`; norms and biases are random too, so that each counts."""
    values = dict(MODELS[name])
    kind = values.pop("model_type")
    sizes = {"initializer_range": 0.2} if kind == "gpt2" else _SIZES
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, vocab_size=vocab_size, max_position_embeddings=positions, **(sizes | values))
    model: Any = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if kind == "nemotron" else 1.0, std=0.3)
    return model.to(dtype).eval()
