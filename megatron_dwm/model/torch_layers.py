"""Transformer layers of plain PyTorch: SDPA attention and torch norms inside megatron-core's layer.

They need neither Transformer Engine nor Apex, work under sequence and context parallelism, and have the parameters and
checkpoint keys of megatron-core's local layers.

Under context parallelism a rank gathers the keys and values of the whole sequence, and attends with its own queries.

Shape legend: s sequence length, t tokens of this rank (s / C for C context-parallel ranks), b samples, n this rank's
heads, g this rank's query groups, d head size.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.model.torch_norms import NORMED_LINEARS, AllKeysNorm, AllQueriesNorm, NormedLinear, norm_class
from megatron_dwm.runtime.compat import mlp_submodules
from megatron_dwm.runtime.context_parallel import chunk_numbers, gather_sequence
from megatron_dwm.runtime.device import current_device


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
        # The arguments are what megatron-core gives every core attention. Scaling by layer number has no
        # effect: it divides before a 16-bit softmax and multiplies inside it, while this softmax is in fp32.
        super().__init__(config=config)
        self.is_causal = attn_mask_type == AttnMaskType.causal
        self.softmax_scale = softmax_scale
        self.window = (
            config.window_size
            if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
            else None
        )
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
        self.tp_group = groups.tp
        self._add_softmax_offset()
        self.cp_group = pg_collection.cp if pg_collection is not None and config.context_parallel_size > 1 else None
        self.attention_dropout = torch.nn.Dropout(
            config.attention_dropout if attention_dropout is None else attention_dropout
        )

    def _add_softmax_offset(self) -> None:
        """Create the softmax offsets: logarithms of what is added to the denominator, for each of this rank's heads."""
        heads = self.config.num_attention_heads // self.tp_group.size()
        self.softmax_offset: torch.Tensor | None = None
        if self.config.softmax_type == "vanilla":
            return
        # The offsets of all heads are drawn, so that a model is initialized the same for every TP size.
        offsets = torch.zeros(self.config.num_attention_heads, device=current_device(), dtype=self.config.params_dtype)
        if self.config.softmax_type == "learnable" and self.config.perform_initialization:
            self.config.init_method(offsets)
        part = offsets[self.tp_group.rank() * heads :][:heads].clone()
        self.softmax_offset = torch.nn.Parameter(part) if self.config.softmax_type == "learnable" else part

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the parts of a checkpoint, the same as megatron-core's local attention's."""
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        return sharded

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
        """Return the attention's output.

        Args:
            query: [t, b, n, d].
            key: [t, b, g, d].
            value: [t, b, g, d].
            attention_mask: broadcastable to [b, n, t, s], True where a query must not see a key; None for the
                causal mask.

        Returns:
            [t, b, n · d].
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise NotImplementedError("attention has neither a bias nor packed sequences with --transformer-impl torch")
        if self.cp_group is not None:
            key, value = gather_sequence(torch.stack([key, value], dim=1), self.cp_group).unbind(dim=1)
        if self.config.sequence_parallel:
            context = self._attend(query, key, value, attention_mask)
        else:
            # Ranks of a tensor-parallel group hold different heads, so that each draws its own dropout masks.
            with tensor_parallel.get_cuda_rng_tracker().fork():
                context = self._attend(query, key, value, attention_mask)
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the attention's output [b, n, t, d] for keys and values of the whole sequence [s, b, g, d]."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if self.cp_group is None or not self.is_causal:
            seen = None if mask is None else ~mask
            if self.is_causal:
                seen = self._seen(seen, 0, q.size(2), k.size(2))
            return self._product(q, k, v, seen, is_causal=self.is_causal and seen is None)
        # Each of a rank's two chunks attends to the keys up to its end. The ranks' work is then equal, and half of what
        # all keys would cost.
        size = self.cp_group.size()
        length = k.size(2) // (2 * size)
        parts = []
        for place, number in enumerate(chunk_numbers(self.cp_group.rank(), size)):
            rows, end = slice(place * length, (place + 1) * length), (number + 1) * length
            seen = self._seen(None if mask is None else ~mask[:, :, rows, :end], end - length, length, end)
            if seen is None:
                seen = causal_lower_right(length, end)
            parts.append(self._product(q[:, :, rows], k[:, :, :end], v[:, :, :end], seen))
        return torch.cat(parts, dim=2)

    def _seen(self, seen: torch.Tensor | None, first: int, num_queries: int, num_keys: int) -> torch.Tensor | None:
        """Return the mask of keys that a query attends to [.., queries, keys]; None if it is the causal mask.

        Args:
            seen: the batch's mask, if it has one, which is causal.
            first: position of the first query in the sequence.
        """
        if self.window is None and self.softmax_offset is None:
            return seen
        device = current_device()
        queries, keys = torch.arange(first, first + num_queries, device=device), torch.arange(num_keys, device=device)
        within = keys <= queries[:, None]
        if self.window is not None:
            within &= keys >= queries[:, None] - self.window[0]
        return within if seen is None else seen & within

    def _product(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Any, *, is_causal: bool = False
    ) -> torch.Tensor:
        """Attend with queries [b, n, .., d]; ``seen`` is True where a query attends to a key, or a causal bias."""
        if self.softmax_offset is not None:
            # One more key, whose logit is the offset and whose value is 0, so that it only takes part in the softmax.
            k, v = (F.pad(tensor, (0, 0, 0, 1)) for tensor in (k, v))
            seen = seen.expand(1 if seen.dim() == 2 else seen.size(0), q.size(1), -1, -1)
            offset = self.softmax_offset.to(q.dtype).view(1, -1, 1, 1).expand(*seen.shape[:3], 1)
            allowed = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)
            seen = torch.cat([allowed, offset], dim=-1)
        is_unfused = self.config.attention_backend is AttnBackend.unfused
        with sdpa_kernel(SDPBackend.MATH) if is_unfused else nullcontext():
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=seen,
                dropout_p=self.attention_dropout.p if self.training else 0.0,
                is_causal=is_causal,
                scale=self.softmax_scale,
                enable_gqa=q.size(1) != k.size(1),
            )


def torch_block_spec(config: TransformerConfig, model: ModelConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline stage, and the norm after the last one.

    They are megatron-core's local layers with other attention and norms.
    """
    norm = norm_class(config)
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    parts = layer.submodules
    attention = parts.self_attention.submodules
    attention.core_attention = TorchAttention
    if config.qk_l2_norm:
        attention.q_layernorm = attention.k_layernorm = L2Norm
    elif model.dwm_qk_norm_all_heads:
        attention.q_layernorm, attention.k_layernorm = AllQueriesNorm, AllKeysNorm
    elif config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    if model.dwm_output_norm:
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
        attention.linear_proj = mlp_submodules(parts.mlp).linear_fc2 = NormedLinear
        parts.sharded_state_dict_keys_map = {f"{name}.linear.": f"{name}." for name in NORMED_LINEARS}
    else:
        parts.input_layernorm = parts.pre_mlp_layernorm = norm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=norm)
