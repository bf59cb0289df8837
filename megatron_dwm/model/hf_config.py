"""Conversion of the language model's configuration to and from Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.errors import UserError
from megatron_dwm.model.hf_rope import rope_flags, rope_parameters
from megatron_dwm.model.hf_window import can_have_window, has_window_in_all_layers, window_flags, window_values
from megatron_dwm.model.transformer_config import has_tanh_gelu

if TYPE_CHECKING:
    from transformers import PretrainedConfig

IMPORTED = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "seed_oss", "phi3", "nemotron", "gpt2")
"""model_type of the Hugging Face models that are read."""

EQUIVALENT_MODEL_TYPES = {"qwen2": "seed_oss"}
"""For model_types beside which AutoTokenizer replaces tokenizers of another kind: one that computes the same and takes
any tokenizer."""

_EXPERTS = "it has experts"
_SIDE_BY_SIDE = "attention and MLP of a layer run in parallel, and megatron-core's one after the other"
_GEMMA = "it scales its embeddings, and norms both the inputs and the outputs of attention and MLP"
_NOT_COMPUTED = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), _GEMMA),
    **dict.fromkeys(("gpt_neox", "gptj", "phi", "falcon", "cohere", "cohere2"), _SIDE_BY_SIDE),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3"), _EXPERTS),
    "olmo3": "its layers have rotary positions of two kinds, and megatron-core's of one",
    "granite": "it scales embeddings, residuals and logits, and megatron-core's GPT does not",
    "smollm3": "some of its layers have no positions, and megatron-core's are all alike",
}
"""Why megatron-core's dense GPT cannot compute a model_type."""

_SILU = ("silu", "swish")
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
_UNGATED = (*_TANH_GELU, "gelu", "relu2")


def architecture(model: ModelConfig) -> str:
    """Return the Hugging Face model_type that is closest to ``model``.

    Rotary positions and RMSNorm make it a Llama, with a bias of queries, keys and values alone a Qwen2, with norms of
    queries and keys a Qwen3, with norms of outputs an OLMo2, with a rotated part of the head a Phi-3, with a window in
    all layers a Mistral; LayerNorm makes it a Nemotron. Learned positions make it a GPT-2.
    """
    if not model.has_rotary_positions:
        return "gpt2"
    if model.normalization == "LayerNorm":
        return "nemotron"
    if model.rotary_percent != 1.0:
        return "phi3"
    if model.dwm_output_norm:
        return "olmo2"
    if model.qk_layernorm:
        return "qwen3"
    if model.add_qkv_bias and not model.add_bias_linear:
        return "qwen2"
    return "mistral" if has_window_in_all_layers(model) else "llama"


def hf_config(
    model: ModelConfig, *, vocab_size: int, num_layers: int, has_any_tokenizer: bool = False
) -> PretrainedConfig:
    """Return the Hugging Face configuration that is equivalent to the language model's.

    Args:
        has_any_tokenizer: use the model_type's equivalent in :data:`EQUIVALENT_MODEL_TYPES`, if there is one.

    Raises:
        UserError: the architecture has no counterpart; the message names the flag that does not fit.
    """
    from transformers import AutoConfig

    kind = architecture(model)
    _check_expressible(model, kind)
    if has_any_tokenizer:
        kind = EQUIVALENT_MODEL_TYPES.get(kind, kind)
    if not can_have_window(model, kind):
        layers = model.window_attn_skip_freq
        flags = f"--window-size {model.window_size}{f' --window-attn-skip-freq {layers}' if layers else ''}"
        raise UserError(f"a Hugging Face {_title(kind)} cannot express {flags}; leave it out")
    positions = model.max_position_embeddings or model.seq_length
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,  # Phi-3's default is a token of its original vocabulary
    }
    if kind == "gpt2":
        values |= {
            "n_positions": positions,
            "n_embd": model.hidden_size,
            "n_layer": num_layers,
            "n_head": model.num_attention_heads,
            "n_inner": model.ffn,
            "activation_function": _activation(model),
            "resid_pdrop": model.hidden_dropout,
            "embd_pdrop": model.hidden_dropout,
            "attn_pdrop": model.attention_dropout,
            "layer_norm_epsilon": model.layernorm_epsilon,
        }
        return AutoConfig.for_model(kind, **values)
    values |= {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn,
        "num_hidden_layers": num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_size,
        "hidden_act": _activation(model),
        "max_position_embeddings": positions,
        "attention_dropout": model.attention_dropout,
        "rope_parameters": rope_parameters(model),
        "norm_eps" if kind == "nemotron" else "rms_norm_eps": model.layernorm_epsilon,
        **window_values(model, kind, num_layers),
    }
    if kind in ("llama", "nemotron"):
        values |= {"attention_bias": model.add_bias_linear, "mlp_bias": model.add_bias_linear}
    if kind == "nemotron":
        values["rope_parameters"].setdefault("partial_rotary_factor", 1.0)  # Nemotron's default is 0.5
    if kind == "seed_oss":
        values |= {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False}
        values["residual_dropout"] = model.hidden_dropout
    if kind == "phi3":
        values |= {"resid_pdrop": model.hidden_dropout, "embd_pdrop": model.hidden_dropout}
    return AutoConfig.for_model(kind, **values)


def _activation(model: ModelConfig) -> str:
    if model.swiglu:
        return "silu"
    if model.squared_relu:
        return "relu2"
    return "gelu_new" if has_tanh_gelu(model) else "gelu"


def _megatron_only(model: ModelConfig) -> dict[str, bool]:
    """Return features of megatron-core's models that no model of transformers has, and whether they are used."""
    return {
        f"--no-rope-freq {model.no_rope_freq}; leave it out": model.no_rope_freq is not None,
        f"--softmax-type {model.softmax_type}; use vanilla": model.softmax_type != "vanilla",
        "--attention-output-gate; leave it out": model.attention_output_gate,
        "--qk-l2-norm; leave it out": model.qk_l2_norm,
        "--quick-geglu; leave it out": model.quick_geglu,
        f"--glu-linear-offset {model.glu_linear_offset}; use 0": model.glu_linear_offset != 0,
        "--activation-func-clamp-value; leave it out": model.activation_func_clamp_value is not None,
    }


def _check_expressible(model: ModelConfig, kind: str) -> None:
    _refuse("a Hugging Face model cannot express", _megatron_only(model))
    if model.positions == "none":
        raise UserError(
            "a Hugging Face model cannot express --position-embedding-type none; use rope or learned_absolute"
        )
    misfits = {
        f"--normalization {model.normalization}; use LayerNorm": kind == "gpt2" and model.normalization != "LayerNorm",
        "--swiglu with LayerNorm; leave it out, or use --normalization RMSNorm": (
            kind in ("gpt2", "nemotron") and model.swiglu
        ),
        "a feed-forward layer without gate; add --swiglu": kind not in ("gpt2", "nemotron") and not model.swiglu,
        "--disable-bias-linear; leave it out": kind == "gpt2" and not model.add_bias_linear,
        "--group-query-attention; leave it out": kind == "gpt2" and model.query_groups != model.num_attention_heads,
        f"--kv-channels {model.kv_channels}; leave it out": (
            kind == "gpt2" and model.head_size * model.num_attention_heads != model.hidden_size
        ),
        f"--num-attention-heads {model.num_attention_heads} that do not divide the hidden size; change it": (
            kind == "llama" and model.hidden_size % model.num_attention_heads != 0
        ),
        "biases; add --disable-bias-linear": kind in ("qwen3", "olmo2", "phi3", "mistral") and model.add_bias_linear,
        "--add-qkv-bias; leave it out": (
            kind in ("qwen3", "olmo2", "phi3", "nemotron") and model.add_qkv_bias and not model.add_bias_linear
        ),
        "--qk-layernorm; leave it out": kind not in ("qwen3", "olmo2") and model.qk_layernorm,
        "--dwm-output-norm; leave it out": kind != "olmo2" and model.dwm_output_norm,
        "--dwm-qk-norm-all-heads; leave it out, or add --dwm-output-norm": (
            kind != "olmo2" and model.dwm_qk_norm_all_heads
        ),
        "--dwm-output-norm alone; add --qk-layernorm --dwm-qk-norm-all-heads": (
            kind == "olmo2" and not model.dwm_qk_norm_all_heads
        ),
        "--rotary-interleaved; leave it out": model.rotary_interleaved,
        "scaled rotary frequencies; leave the scaling out, or use --rotary-percent 1.0": (
            kind == "phi3" and rope_parameters(model)["rope_type"] != "default"
        ),
        "--apply-layernorm-1p; leave it out": kind != "nemotron" and model.layernorm_zero_centered_gamma,
    }
    _refuse(f"a Hugging Face {_title(kind)} cannot express", misfits)


def _title(kind: str) -> str:
    names = {"gpt2": "GPT-2", "llama": "Llama", "olmo2": "OLMo2", "phi3": "Phi-3"}
    return names.get(kind, kind.capitalize())


def _refuse(subject: str, misfits: Mapping[str, bool]) -> None:
    """Raise for the first misfit that holds; its name is ``"what; remedy"``."""
    for name, holds in misfits.items():
        if holds:
            raise UserError(f"{subject} {name}")


def model_config(config: PretrainedConfig) -> ModelConfig:
    """Return the language model's configuration that is equivalent to a Hugging Face ``config``.

    The inverse of :func:`hf_config`; the sequence length is the number of positions.

    Raises:
        UserError: the architecture is not supported, or has a feature that the language model does not have.
    """
    kind = config.model_type
    if kind not in IMPORTED:
        reason = f": {_NOT_COMPUTED[kind]}" if kind in _NOT_COMPUTED else ""
        raise UserError(f"a {kind} model cannot be imported{reason}; use one of {', '.join(IMPORTED)}")
    flags = _gpt2_flags(config) if kind == "gpt2" else _rotary_flags(config)
    return ModelConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        seq_length=config.max_position_embeddings,
        max_position_embeddings=config.max_position_embeddings,
        init_method_std=config.initializer_range,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        **flags,
    )


def _rotary_flags(config: PretrainedConfig) -> dict[str, Any]:
    kind, activation = config.model_type, config.hidden_act
    subject = f"cannot import a {_title(kind)} with"
    attention_bias, mlp_bias = (bool(getattr(config, name, False)) for name in ("attention_bias", "mlp_bias"))
    if kind == "seed_oss":
        has_qkv_bias, attention_bias = attention_bias, config.attention_out_bias
    else:
        has_qkv_bias = kind == "qwen2"
    has_biases = attention_bias or mlp_bias
    try:
        positions = rope_flags(config.rope_parameters)
    except UserError as error:
        raise UserError(f"{subject} {error}") from None
    _refuse(
        subject,
        {
            f"hidden_act {activation}": activation not in (_UNGATED if kind == "nemotron" else _SILU),
            f"hidden_act {activation} without biases": activation in _TANH_GELU and not has_biases,
            f"partial_rotary_factor {positions['rotary_percent']}, which transformers ignores there": (
                kind not in ("phi3", "nemotron") and positions["rotary_percent"] != 1.0
            ),
            "attention_bias beside norms of queries and keys": kind in ("qwen3", "olmo2") and attention_bias,
            f"embd_pdrop {getattr(config, 'embd_pdrop', 0)} beside resid_pdrop": (
                getattr(config, "embd_pdrop", 0) != getattr(config, "resid_pdrop", 0)
            ),
        },
    )
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    flags = {
        **positions,
        **window_flags(config),
        "normalization": "LayerNorm" if kind == "nemotron" else "RMSNorm",
        "layernorm_epsilon": config.norm_eps if kind == "nemotron" else config.rms_norm_eps,
        "qk_layernorm": kind in ("qwen3", "olmo2"),
        "dwm_qk_norm_all_heads": kind == "olmo2",
        "dwm_output_norm": kind == "olmo2",
        "swiglu": kind != "nemotron",
        # megatron-core has biases in all linear layers or in none; those that are not there are imported as zeros.
        "add_bias_linear": has_biases,
        "add_qkv_bias": has_qkv_bias and not has_biases,
        "ffn_hidden_size": config.intermediate_size,
        "kv_channels": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups if groups != heads else 1,
        "hidden_dropout": float(getattr(config, "residual_dropout", getattr(config, "resid_pdrop", 0.0))),
        "attention_dropout": float(config.attention_dropout or 0.0),
    }
    return flags | ({} if flags["swiglu"] else _ungated_flags(activation))


def _ungated_flags(activation: str) -> dict[str, Any]:
    """Return the flags of an activation without gate.

    Megatron-LM's GELU is its tanh approximation if it is fused with the bias; squared ReLU cannot be fused.
    """
    return {"squared_relu": activation == "relu2", "bias_gelu_fusion": activation in _TANH_GELU}


def _gpt2_flags(config: PretrainedConfig) -> dict[str, Any]:
    activation = config.activation_function
    _refuse(
        "cannot import a GPT-2 with",
        {
            f"activation_function {activation}": activation not in _UNGATED,
            "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
            "attention scores that are not scaled": not config.scale_attn_weights,
            "add_cross_attention": config.add_cross_attention,
            f"embd_pdrop {config.embd_pdrop} beside resid_pdrop {config.resid_pdrop}": config.embd_pdrop
            != config.resid_pdrop,
        },
    )
    return {
        "layernorm_epsilon": config.layer_norm_epsilon,
        **_ungated_flags(activation),
        "ffn_hidden_size": config.n_inner,
        "hidden_dropout": config.resid_pdrop,
        "attention_dropout": config.attn_pdrop,
    }
