"""A workaround for the recomputation of an MLP with biases.

megatron-core's MLP returns its last bias separately, as the parameter itself. As an output of a recomputed function the
parameter becomes part of that function's graph, so that the backward pass through the recomputed MLP reaches the same
function again, in an infinite recursion.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer


def return_bias_copies(chunk: torch.nn.Module) -> None:
    """Make the recomputed MLPs of ``chunk`` return a copy of their bias."""
    for layer in chunk.modules():
        if isinstance(layer, TransformerLayer) and layer.recompute_mlp:
            layer.mlp.register_forward_hook(_copy_bias)


def _copy_bias(_module: torch.nn.Module, _inputs: Any, outputs: Any) -> Any:
    output, bias = outputs
    return output, None if bias is None else bias.clone()
