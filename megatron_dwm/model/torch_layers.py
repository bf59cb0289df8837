"""Transformer layers of plain PyTorch: SDPA attention and torch norms inside megatron-core's layer.

They need neither Transformer Engine nor Apex, work under sequence parallelism, and have the parameters and
checkpoint keys of megatron-core's local layers.

Shape legend: s sequence length, b samples, n this rank's heads, g this rank's query groups, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig


class TorchAttention(MegatronModule):  # type: ignore[misc]  # megatron-core carries no types
    """Core attention by ``torch.nn.functional.scaled_dot_product_attention``."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        # The arguments are what megatron-core gives every core attention. Scaling by layer number leaves no
        # trace: it divides before a 16-bit softmax and multiplies inside it, and this softmax is in fp32.
        super().__init__(config=config)
        self.is_causal = attn_mask_type == AttnMaskType.causal
        self.softmax_scale = softmax_scale
        self.attention_dropout = torch.nn.Dropout(
            config.attention_dropout if attention_dropout is None else attention_dropout
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [s, b, n, d].
            key: [s, b, g, d].
            value: [s, b, g, d].
            attention_mask: broadcastable to [b, n, s, s], True where a query must not see a key; None for the
                causal mask.

        Returns:
            [s, b, n · d].
        """
        assert attention_bias is None and packed_seq_params is None
        if self.config.sequence_parallel:
            context = self._attend(query, key, value, attention_mask)
        else:
            # Ranks of a tensor-parallel group hold different heads: dropout takes their own random stream.
            with tensor_parallel.get_cuda_rng_tracker().fork():
                context = self._attend(query, key, value, attention_mask)
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the attention's output [b, n, s, d]."""
        return F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=None if mask is None else ~mask,
            dropout_p=self.attention_dropout.p if self.training else 0.0,
            is_causal=self.is_causal and mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.size(2) != key.size(2),
        )


class TorchLayerNorm(torch.nn.LayerNorm):
    """LayerNorm, replicated over the tensor-parallel group."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        _mark_partial_gradients(self, config)


class TorchRMSNorm(torch.nn.RMSNorm):
    """RMSNorm, replicated over the tensor-parallel group."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        _mark_partial_gradients(self, config)


def _mark_partial_gradients(norm: torch.nn.Module, config: TransformerConfig) -> None:
    # Under sequence parallelism each rank norms its part of the sequence; megatron-core sums the gradients of
    # parameters marked so over the tensor-parallel group.
    for param in norm.parameters():
        param.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def torch_block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, and the norm after the last one.

    It is megatron-core's local layer with the attention and the norms exchanged.
    """
    norm = TorchRMSNorm if config.normalization == "RMSNorm" else TorchLayerNorm
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    layer.submodules.input_layernorm = norm
    layer.submodules.pre_mlp_layernorm = norm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = TorchAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=norm)
