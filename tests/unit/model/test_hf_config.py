"""What megatron-core's dense GPT does not compute is refused by name; scaled positions are the same both ways."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.errors import UserError
from megatron_dwm.model.hf_config import hf_config, model_config
from megatron_dwm.model.hf_rope import rope_flags, rope_parameters

SIZES: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}
PARTIAL = {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "rope_theta": 1e4, "low_freq_factor": 2.0, "high_freq_factor": 4.0}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("olmo3", SIZES, "a olmo3 model cannot be imported: its layers have rotary positions of two kinds"),
    ("gemma2", SIZES, "it scales its embeddings"),
    ("gpt_neox", SIZES, "attention and MLP of a layer run in parallel"),
    ("mixtral", SIZES, "it has experts"),
    ("smollm3", SIZES, "no positions"),
    ("qwen3", {**SIZES, "attention_bias": True}, "attention_bias beside norms of queries and keys"),
    ("olmo2", {**SIZES, "attention_bias": True}, "attention_bias beside norms of queries and keys"),
    ("llama", {**SIZES, "rope_parameters": PARTIAL}, "partial_rotary_factor 0.5, which transformers ignores there"),
    ("llama", {**SIZES, "hidden_act": "gelu"}, "hidden_act gelu"),
    ("nemotron", {**SIZES, "hidden_act": "gelu_new"}, "hidden_act gelu_new without biases"),
    ("phi3", {**SIZES, "resid_pdrop": 0.1}, "embd_pdrop 0.0 beside resid_pdrop"),
    ("llama", {**SIZES, "rope_parameters": LINEAR}, "a linear rope factor of 2.5; megatron-core's is a whole number"),
    ("llama", {**SIZES, "rope_parameters": DYNAMIC}, "rope_type dynamic; megatron-core has linear, yarn and llama3"),
    ("llama", {**SIZES, "rope_parameters": LLAMA3}, "the rope_parameters {'low_freq_factor': 2.0"),
    ("llama", {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 0.5}}, "rope_theta 0.5"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"activation_function": "relu"}, "activation_function relu"),
]


@pytest.mark.parametrize(("kind", "values", "said"), REFUSED)
def test_what_is_not_computed_is_refused_by_name(kind: str, values: dict[str, Any], said: str):
    with pytest.raises(UserError, match=re.escape(said)) as error:
        model_config(AutoConfig.for_model(kind, **values))
    assert "\n" not in str(error.value)


def test_a_window_that_no_sequence_exceeds_is_none():
    sizes = {**SIZES, "num_key_value_heads": 2, "sliding_window": 64, "max_position_embeddings": 64}
    config = AutoConfig.for_model("mistral", **sizes)
    assert model_config(config).seq_length == 64 and model_config(config).window is None


def _windowed(**flags: Any) -> ModelConfig:
    sizes = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 16, "ffn_hidden_size": 8}
    kind = {"position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False}
    return ModelConfig(**sizes, **{**kind, "window_size": "3,0", **flags})


def test_a_window_of_some_layers_is_that_of_the_first_ones_too():
    """The weighter that starts from a language model has its first layers."""
    model = _windowed(add_qkv_bias=True, window_attn_skip_freq="2")
    whole, first = (hf_config(model, vocab_size=9, num_layers=layers) for layers in (2, 1))
    assert whole.sliding_window == first.sliding_window == 4
    assert (whole.layer_types, first.layer_types) == (["sliding_attention", "full_attention"], ["sliding_attention"])
    assert hf_config(_windowed(window_size="15,0"), vocab_size=9, num_layers=2).model_type == "llama"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            {"window_attn_skip_freq": "[1,0]"},
            "a Hugging Face Llama cannot express --window-size 3,0 --window-attn-skip",
        ),
        (
            {"qk_layernorm": True, "dwm_qk_norm_all_heads": True, "dwm_output_norm": True},
            "OLMo2 cannot express --window",
        ),
        ({"add_bias_linear": True}, "a Hugging Face Mistral cannot express biases; add --disable-bias-linear"),
        ({"normalization": "LayerNorm", "swiglu": False}, "a Hugging Face Nemotron cannot express --window-size 3,0"),
    ],
)
def test_a_window_that_no_model_of_transformers_has_is_refused(flags: dict[str, Any], said: str):
    with pytest.raises(UserError, match=re.escape(said)):
        hf_config(_windowed(**flags), vocab_size=9, num_layers=2)


YARN: dict[str, Any] = {"position_embedding_type": "yarn", "rotary_scaling_factor": 4.0}
ROTARY: list[dict[str, Any]] = [
    {"position_embedding_type": "rope", "rotary_base": 500, "rotary_percent": 0.5},
    {"position_embedding_type": "rope", "rotary_seq_len_interpolation_factor": 2},
    {"position_embedding_type": "rope", "use_rope_scaling": True, "rope_scaling_factor": 32.0},
    {**YARN, "yarn_original_max_position_embeddings": 32, "yarn_beta_fast": 16.0},
    {**YARN, "mscale": 0.707, "mscale_all_dim": 1.5, "yarn_correction_range_round_to_int": False},
    {**YARN, "mscale": 2.0},
]


@pytest.mark.parametrize("flags", ROTARY)
def test_rotary_positions_are_the_same_there_and_back(flags: dict[str, Any]):
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 8}
    model = ModelConfig(**sizes, **flags)
    back = ModelConfig(**sizes, **rope_flags(rope_parameters(model)))
    assert rope_parameters(back) == pytest.approx(rope_parameters(model))
    assert {name: getattr(back, name) for name in flags} == pytest.approx(flags)
