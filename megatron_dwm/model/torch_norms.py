"""Norms of plain PyTorch for the torch layers: of inputs and outputs of attention and MLP, and of queries and keys.

Shape legend: t tokens of this rank, b samples, n heads of this rank (query or key heads), d head size, h hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

NORMED_LINEARS = ("self_attention.linear_proj", "mlp.linear_fc2")
"""Where a layer with :class:`NormedLinear` has them."""


class TorchLayerNorm(torch.nn.LayerNorm):
    """LayerNorm, replicated over the tensor-parallel group."""

    config: TransformerConfig

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        _prepare_weights(self, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalized input, in its shape [t, b, ..]."""
        if not self.config.layernorm_zero_centered_gamma:
            return super().forward(x)
        normed = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        return normed.addcmul(normed, self.weight) + self.bias


class TorchRMSNorm(torch.nn.RMSNorm):
    """RMSNorm, replicated over the tensor-parallel group."""

    config: TransformerConfig

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        _prepare_weights(self, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalized input, in its shape [t, b, ..]."""
        if not self.config.layernorm_zero_centered_gamma:
            return super().forward(x)
        normed = F.rms_norm(x, self.normalized_shape, eps=self.eps)
        return normed.addcmul(normed, self.weight)


def norm_class(config: TransformerConfig) -> type[TorchLayerNorm | TorchRMSNorm]:
    """Return the class of the model's norms."""
    return TorchRMSNorm if config.normalization == "RMSNorm" else TorchLayerNorm


def _prepare_weights(norm: TorchLayerNorm | TorchRMSNorm, config: TransformerConfig) -> None:
    norm.config = config
    if config.layernorm_zero_centered_gamma:  # the parameter is the weight minus 1, which 16 bits hold more precisely
        torch.nn.init.zeros_(norm.weight)
    # Under sequence parallelism each rank norms its part of the sequence; megatron-core sums the gradients of
    # parameters marked so over the tensor-parallel group.
    for param in norm.parameters():
        param.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class _AllHeadsNorm(TorchRMSNorm):
    """RMSNorm over all heads of a token, which are split over the tensor-parallel group.

    Every rank holds the weights of all heads and uses those of its own, so that its gradient is zero elsewhere;
    megatron-core sums the gradients of norms of queries and keys over the group.
    """

    heads_field: str
    """The field of megatron-core's configuration with the number of heads."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        """
        Args:
            hidden_size: d.
        """
        heads = getattr(config, self.heads_field)
        super().__init__(config, heads * hidden_size, eps)
        self.heads = heads
        self.tp_group = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"]).tp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalized heads [t, b, n, d]; a collective call of the tensor-parallel group."""
        ranks = self.tp_group.size()
        if ranks == 1:
            return super().forward(x.flatten(-2)).view_as(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        squares = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide).square()
        # Each rank's output depends on the sum, so that its gradient is summed too. Ranks that share a key head count
        # it equally often.
        total = reduce_from_tensor_model_parallel_region(squares, self.tp_group)
        mean = copy_to_tensor_model_parallel_region(total, self.tp_group) / (ranks * x.size(-2) * x.size(-1))
        first = self.tp_group.rank() * self.heads // ranks
        weight = self.weight.view(self.heads, -1)[first : first + x.size(-2)]
        if self.config.layernorm_zero_centered_gamma:
            weight = weight + 1
        normed: torch.Tensor = x * (mean + self.eps).rsqrt() * weight
        return normed.to(x.dtype)


class AllQueriesNorm(_AllHeadsNorm):
    """RMSNorm over all query heads."""

    heads_field = "num_attention_heads"


class AllKeysNorm(_AllHeadsNorm):
    """RMSNorm over all key heads."""

    heads_field = "num_query_groups"


class NormedLinear(MegatronModule):  # type: ignore[misc]  # megatron-core carries no types
    """The last linear layer of attention or MLP, and a norm of its output."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **settings: Any) -> None:
        """
        Args:
            settings: further arguments of RowParallelLinear.
        """
        super().__init__(config=config)
        self.linear = RowParallelLinear(input_size, output_size, config=config, **settings)
        self.post_layernorm = norm_class(config)(config, output_size, config.layernorm_epsilon)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the output [t, b, h], and None instead of a bias that is still to be added."""
        output, bias = self.linear(x)
        return self.post_layernorm(output if bias is None else output + bias), None
