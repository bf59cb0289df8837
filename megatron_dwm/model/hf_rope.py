"""Conversion of rotary positions between the language model's flags and Hugging Face's rope_parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.errors import UserError

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Llama 3's parameters, which megatron-core's scaling of rotary frequencies uses with any factor."""


def rope_parameters(model: ModelConfig) -> dict[str, Any]:
    """Return the rope_parameters of a model with rotary positions.

    Raises:
        UserError: two ways of scaling are combined.
    """
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": float(model.rotary_base)}
    if model.rotary_percent != 1.0:
        parameters["partial_rotary_factor"] = model.rotary_percent
    interpolation = model.rotary_seq_len_interpolation_factor or 1
    if model.use_rope_scaling and interpolation != 1:
        raise UserError(
            "a Hugging Face model cannot express --use-rope-scaling with --rotary-seq-len-interpolation-factor; "
            "leave one out"
        )
    if model.positions == "yarn":
        parameters |= _yarn_parameters(model)
    elif model.use_rope_scaling:
        parameters |= {"rope_type": "llama3", "factor": model.rope_scaling_factor, **LLAMA3}
    elif interpolation != 1:
        parameters |= {"rope_type": "linear", "factor": float(interpolation)}
    return parameters


def _yarn_parameters(model: ModelConfig) -> dict[str, Any]:
    parameters = {
        "rope_type": "yarn",
        "factor": model.rotary_scaling_factor,
        "original_max_position_embeddings": model.yarn_original_max_position_embeddings,
        "beta_fast": model.yarn_beta_fast,
        "beta_slow": model.yarn_beta_slow,
        "truncate": model.yarn_correction_range_round_to_int,
    }
    if model.mscale and model.mscale_all_dim:
        return parameters | {"mscale": model.mscale, "mscale_all_dim": model.mscale_all_dim}
    if (model.mscale, model.mscale_all_dim) == (1.0, 0.0):
        return parameters  # the default there too
    factor = _attention_factor(model.rotary_scaling_factor, model.mscale)
    return parameters | {
        "attention_factor": factor / _attention_factor(model.rotary_scaling_factor, model.mscale_all_dim)
    }


def _attention_factor(scale: float, mscale: float) -> float:
    """Return YaRN's factor of queries and keys (arXiv 2309.00071, section 3.4), with megatron-core's ``mscale``."""
    return 0.1 * mscale * math.log(scale) + 1.0


def rope_flags(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ModelConfig for a Hugging Face configuration's rope_parameters.

    Raises:
        UserError: megatron-core does not support them; the message says why.
    """
    rope = {name: value for name, value in parameters.items() if value is not None and name != "type"}
    kind, base, percent = rope.pop("rope_type"), rope.pop("rope_theta"), rope.pop("partial_rotary_factor", 1.0)
    flags = {"position_embedding_type": "rope", "rotary_base": int(base), "rotary_percent": percent}
    if base != int(base):
        raise UserError(f"rope_theta {base}; megatron-core's is a whole number")
    if kind == "llama3":
        flags |= {"use_rope_scaling": True, "rope_scaling_factor": rope.pop("factor")}
        if rope == LLAMA3:
            return flags
    elif kind == "linear":
        factor = rope.pop("factor")
        if factor != int(factor):
            raise UserError(f"a linear rope factor of {factor}; megatron-core's is a whole number")
        flags["rotary_seq_len_interpolation_factor"] = int(factor) if factor != 1 else None
    elif kind == "yarn":
        flags |= _yarn_flags(rope)
    elif kind != "default":
        raise UserError(f"rope_type {kind}; megatron-core has linear, yarn and llama3")
    if rope:
        raise UserError(f"the rope_parameters {rope}")
    return flags


def _yarn_flags(rope: dict[str, Any]) -> dict[str, Any]:
    """Return the flags of YaRN, and remove its parameters from ``rope``."""
    factor = float(rope.pop("factor"))
    mscale, mscale_all_dim = rope.pop("mscale", 0.0), rope.pop("mscale_all_dim", 0.0)
    if not (mscale and mscale_all_dim):
        mscale, mscale_all_dim = 1.0, 0.0
    attention = rope.pop("attention_factor", None)
    if attention is not None:  # it replaces these two
        if factor <= 1.0:
            raise UserError(f"attention_factor {attention} with a yarn factor of {factor}")
        mscale, mscale_all_dim = (attention - 1.0) / (0.1 * math.log(factor)), 0.0
    return {
        "position_embedding_type": "yarn",
        "rotary_scaling_factor": factor,
        "mscale": float(mscale),
        "mscale_all_dim": float(mscale_all_dim),
        "yarn_original_max_position_embeddings": int(rope.pop("original_max_position_embeddings")),
        "yarn_beta_fast": float(rope.pop("beta_fast", None) or 32),
        "yarn_beta_slow": float(rope.pop("beta_slow", None) or 1),
        "yarn_correction_range_round_to_int": bool(rope.pop("truncate", True)),
    }
