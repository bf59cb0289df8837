"""The layer implementation of a model, and its fused kernels, on this machine."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.common.embeddings import rope_utils

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.errors import UserError


def resolve_transformer_impl(model: ModelConfig, device: torch.device) -> str:
    """Return the layer implementation of the model: ``"transformer_engine"``, ``"local"`` or ``"torch"``.

    Raises:
        UserError: Transformer Engine is requested and cannot be used.
    """
    usable = HAVE_TE and device.type == "cuda"
    if model.transformer_impl is None:
        return "transformer_engine" if usable and not model.needs_torch_layers else "torch"
    if model.transformer_impl == "transformer_engine" and not usable:
        reason = "it needs a GPU" if HAVE_TE else "Transformer Engine is not installed"
        raise UserError(f"--transformer-impl transformer_engine: {reason}; use --transformer-impl torch")
    return model.transformer_impl


def without_fusions(values: dict[str, Any]) -> dict[str, Any]:
    """Return the changes to a TransformerConfig that disable fused kernels.

    A CPU has none of them. The model computes the same function.
    """
    plain: dict[str, Any] = dict.fromkeys(
        (
            "apply_rope_fusion",
            "bias_activation_fusion",
            "bias_dropout_fusion",
            "cross_entropy_loss_fusion",
            "gradient_accumulation_fusion",
            "masked_softmax_fusion",
            "persist_layer_norm",
        ),
        False,
    )
    if values["activation_func"] is F.gelu and values["bias_activation_fusion"]:
        plain["activation_func"] = functools.partial(F.gelu, approximate="tanh")
    return plain


def available_kernels(values: dict[str, Any], impl: str) -> dict[str, Any]:
    """Return which of the requested fused kernels (by default all) are installed."""
    has_apex_norm = impl != "local" or (is_importable("apex") and values["normalization"] == "LayerNorm")
    available = {
        "apply_rope_fusion": rope_utils.fused_apply_rotary_pos_emb is not None,
        # Transformer Engine's layers could do without Apex's extension; megatron-core's output layer cannot.
        "gradient_accumulation_fusion": is_importable("fused_weight_gradient_mlp_cuda"),
        "masked_softmax_fusion": is_importable("scaled_upper_triang_masked_softmax_cuda"),
        "persist_layer_norm": has_apex_norm,
    }
    return {name: values[name] and found for name, found in available.items()}


def is_importable(module: str) -> bool:
    """Return whether a module can be imported."""
    # A compiled extension can be installed and yet fail to load, so looking for its file is not enough.
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True
