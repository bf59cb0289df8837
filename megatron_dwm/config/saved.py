"""The arguments that a checkpoint was saved with, by this programme or Megatron-LM, as flags again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dwm.config.model import lacking_flag
from megatron_dwm.errors import UserError

UNKNOWN_PARTS = (
    "activation_func_clamp_value",
    "apply_residual_connection_post_layernorm",
    "attention_output_gate",
    "experimental_attention_variant",
    "glu_linear_offset",
    "is_hybrid_model",
    "linear_attention_freq",
    "mtp_num_layers",
    "no_rope_freq",
    "openai_gelu",
    "qk_l2_norm",
    "quick_geglu",
    "rotary_seq_len_interpolation_factor",
    "window_size",
)
"""Arguments in Megatron-LM's checkpoints that, where set, make another model of the same tensors."""

_IF_NOT_GIVEN = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "seq_length",
    "max_position_embeddings",
    "padded_vocab_size",
    "tokenizer_type",
    "tokenizer_model",
)
_ALWAYS = (
    "group_query_attention",
    "num_query_groups",
    "position_embedding_type",
    "add_position_embedding",
    "use_rotary_position_embeddings",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "add_bias_linear",
    "add_qkv_bias",
    "squared_relu",
    "swiglu",
    "untie_embeddings_and_output_weights",
    "normalization",
    "apply_query_key_layer_scaling",
    "attention_dropout",
    "hidden_dropout",
    "num_experts",
    "tiktoken_pattern",
    # Megatron-LM does not take these, and so trains another model where they are not given again.
    "use_rope_scaling",
    "rope_scaling_factor",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "qk_layernorm",
)


def read_arguments(folder: Path) -> dict[str, Any]:
    """The arguments that the checkpoint in ``folder`` was saved with.

    Raises:
        UserError: it has none.
    """
    from megatron.core import dist_checkpointing

    common = dist_checkpointing.load_common_state_dict(str(folder))
    if "args" not in common:
        raise UserError(f"{folder}: its common.pt holds no arguments; it is not a checkpoint of pretraining")
    return vars(common["args"])


def effective_arguments(saved: Mapping[str, Any]) -> dict[str, Any]:
    """``saved`` without values that have no effect beside the others, which Megatron-LM keeps and itself sets.

    Raises:
        UserError: they describe a model that this programme does not train.
    """
    foreign = {name: saved[name] for name in UNKNOWN_PARTS if saved.get(name)}
    if saved.get("softmax_type", "vanilla") != "vanilla":
        foreign["softmax_type"] = saved["softmax_type"]
    for name, value in foreign.items():
        raise UserError(f"the checkpoint was saved with {name}={value}; there is no such model here, give another")
    return {name: value for name, value in saved.items() if lacking_flag(name, saved) is None}


def with_saved_arguments(given: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """What ``--use-checkpoint-args`` makes of the flags.

    As in Megatron-LM, the architecture is the checkpoint's whatever the flags say, and sizes are where they are not
    given. So is the tokenizer, which Megatron-LM always takes from the checkpoint.

    Args:
        given: values of the flags that were given, by field.
        saved: a checkpoint's arguments.

    Raises:
        UserError: they describe a model that this programme does not train.
    """
    known = {name: value for name, value in effective_arguments(saved).items() if value is not None}
    own = {name: value for name, value in given.items() if name not in _ALWAYS or name not in saved}
    taken = {name: known[name] for name in (*_IF_NOT_GIVEN, *_ALWAYS) if name in known}
    return taken | own
