"""The configuration of the language model as a Hugging Face Llama or GPT-2, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.errors import UserError
from megatron_dwm.model.hf_weights import is_llama
from megatron_dwm.model.transformer_config import has_tanh_gelu

if TYPE_CHECKING:
    from transformers import GPT2Config, LlamaConfig, PretrainedConfig

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What megatron-core's rotary scaling takes for granted, beside its factor: Llama 3's."""


def hf_config(model: ModelConfig, *, vocab_size: int, num_layers: int) -> PretrainedConfig:
    """The Hugging Face configuration that computes what the language model computes.

    Rotary positions make it a Llama, learned ones a GPT-2.

    Raises:
        UserError: the architecture is neither's; the message names the flag that does not fit.
    """
    _refuse("a Hugging Face model cannot express", _megatron_alone(model))
    if is_llama(model):
        return _llama_config(model, vocab_size, num_layers)
    if model.positions == "learned_absolute":
        return _gpt2_config(model, vocab_size, num_layers)
    raise UserError(
        f"a Hugging Face model cannot express --position-embedding-type {model.positions}; use rope or learned_absolute"
    )


def _llama_config(model: ModelConfig, vocab_size: int, num_layers: int) -> LlamaConfig:
    from transformers import LlamaConfig

    _refuse(
        "a Hugging Face Llama cannot express",
        {
            f"--normalization {model.normalization}; use RMSNorm": model.normalization != "RMSNorm",
            "a feed-forward layer without gate; add --swiglu": not model.swiglu,
            "biases; add --disable-bias-linear": model.add_bias_linear,
            "--add-qkv-bias; leave it out": model.add_qkv_bias,
            f"--rotary-percent {model.rotary_percent}; use 1.0": model.rotary_percent != 1.0,
            "--rotary-interleaved; leave it out": model.rotary_interleaved,
            "--rotary-seq-len-interpolation-factor; leave it out": (
                model.rotary_seq_len_interpolation_factor not in (None, 1)
            ),
        }
        | _refused_norms(model),
    )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(model.rotary_base)}
    if model.use_rope_scaling:
        rope |= {"rope_type": "llama3", "factor": model.rope_scaling_factor, **LLAMA3_ROPE}
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=model.hidden,
        intermediate_size=model.ffn,
        num_hidden_layers=num_layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.query_groups,
        head_dim=model.head_size,
        hidden_act="silu",
        max_position_embeddings=model.max_position_embeddings or model.sequence,
        initializer_range=model.init_method_std,
        rms_norm_eps=model.layernorm_epsilon,
        tie_word_embeddings=not model.untie_embeddings_and_output_weights,
        rope_parameters=rope,
        attention_dropout=model.attention_dropout,
        bos_token_id=None,
        eos_token_id=None,
    )


def _gpt2_config(model: ModelConfig, vocab_size: int, num_layers: int) -> GPT2Config:
    from transformers import GPT2Config

    _refuse(
        "a Hugging Face GPT-2 cannot express",
        {
            f"--normalization {model.normalization}; use LayerNorm": model.normalization != "LayerNorm",
            "--swiglu; leave it out": model.swiglu,
            "--squared-relu; leave it out": model.squared_relu,
            "--disable-bias-linear; leave it out": not model.add_bias_linear,
            "--group-query-attention; leave it out": model.query_groups != model.heads,
            f"--kv-channels {model.kv_channels}; leave it out": model.head_size * model.heads != model.hidden,
        }
        | _refused_norms(model),
    )
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=model.max_position_embeddings or model.sequence,
        n_embd=model.hidden,
        n_layer=num_layers,
        n_head=model.heads,
        n_inner=model.ffn,
        activation_function="gelu_new" if has_tanh_gelu(model) else "gelu",
        resid_pdrop=model.hidden_dropout,
        embd_pdrop=model.hidden_dropout,
        attn_pdrop=model.attention_dropout,
        layer_norm_epsilon=model.layernorm_epsilon,
        initializer_range=model.init_method_std,
        tie_word_embeddings=not model.untie_embeddings_and_output_weights,
        bos_token_id=None,
        eos_token_id=None,
    )


def _megatron_alone(model: ModelConfig) -> dict[str, bool]:
    """Parts of megatron-core's models that no model of transformers has, whose presence is a misfit."""
    return {
        f"--window-size {model.window_size}; leave it out": model.window_size is not None,
        f"--no-rope-freq {model.no_rope_freq}; leave it out": model.no_rope_freq is not None,
        f"--softmax-type {model.softmax_type}; use vanilla": model.softmax_type != "vanilla",
        "--attention-output-gate; leave it out": model.attention_output_gate,
        "--qk-l2-norm; leave it out": model.qk_l2_norm,
        "--quick-geglu; leave it out": model.quick_geglu,
        f"--glu-linear-offset {model.glu_linear_offset}; use 0": model.glu_linear_offset != 0,
        "--activation-func-clamp-value; leave it out": model.activation_func_clamp_value is not None,
    }


def _refused_norms(model: ModelConfig) -> dict[str, bool]:
    return {
        "--qk-layernorm; leave it out": model.qk_layernorm,
        "--apply-layernorm-1p; leave it out": model.layernorm_zero_centered_gamma,
    }


def _refuse(subject: str, misfits: Mapping[str, bool]) -> None:
    """Raise for the first misfit that holds; its name is ``"what; remedy"``."""
    for name, holds in misfits.items():
        if holds:
            raise UserError(f"{subject} {name}")


def model_config(config: PretrainedConfig) -> ModelConfig:
    """The language model that computes what a LlamaForCausalLM or GPT2LMHeadModel of ``config`` computes.

    The inverse of :func:`hf_config`; the sequence length is all the positions there are.

    Raises:
        UserError: the architecture is another, or has something that the language model has not.
    """
    if config.model_type == "llama":
        return ModelConfig(**_common_sizes(config), **_llama_flags(config))
    if config.model_type == "gpt2":
        return ModelConfig(**_common_sizes(config), **_gpt2_flags(config))
    raise UserError(f"a {config.model_type} model cannot be imported; use a llama or gpt2 one")


def _common_sizes(config: PretrainedConfig) -> dict[str, Any]:
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "init_method_std": config.initializer_range,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
    }


def _llama_flags(config: PretrainedConfig) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    kind, base = rope.pop("rope_type"), rope.pop("rope_theta")
    factor = rope.pop("factor", 8.0)
    _refuse(
        "a Llama cannot be imported that has",
        {
            f"hidden_act {config.hidden_act}": config.hidden_act != "silu",
            "attention_bias": config.attention_bias,
            "mlp_bias": config.mlp_bias,
            f"rope_theta {base}": base != int(base),
            f"rope_type {kind}": kind not in ("default", "llama3"),
            f"the rope_parameters {rope}": rope != (LLAMA3_ROPE if kind == "llama3" else {}),
        },
    )
    return {
        "position_embedding_type": "rope",
        "rotary_base": int(base),
        "use_rope_scaling": kind == "llama3",
        "rope_scaling_factor": factor,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "swiglu": True,
        "add_bias_linear": False,
        "ffn_hidden_size": config.intermediate_size,
        "kv_channels": config.head_dim,
        "group_query_attention": config.num_key_value_heads != config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads
        if config.num_key_value_heads != config.num_attention_heads
        else 1,
        "hidden_dropout": 0.0,
        "attention_dropout": config.attention_dropout,
    }


def _gpt2_flags(config: PretrainedConfig) -> dict[str, Any]:
    activation = config.activation_function
    _refuse(
        "a GPT-2 cannot be imported that has",
        {
            f"activation_function {activation}": activation not in ("gelu_new", "gelu_pytorch_tanh", "gelu"),
            "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
            "attention scores that are not scaled": not config.scale_attn_weights,
            "add_cross_attention": config.add_cross_attention,
            f"embd_pdrop {config.embd_pdrop} beside resid_pdrop {config.resid_pdrop}": config.embd_pdrop
            != config.resid_pdrop,
        },
    )
    return {
        "layernorm_epsilon": config.layer_norm_epsilon,
        "bias_gelu_fusion": activation != "gelu",
        "ffn_hidden_size": config.n_inner,
        "hidden_dropout": config.resid_pdrop,
        "attention_dropout": config.attn_pdrop,
    }
