"""Configurations for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.optimizer import OptimizerConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.config.training import TrainingConfig
from megatron_dwm.model.transformer_config import transformer_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 16,
    "max_position_embeddings": 16,
}


def build_config(
    device: torch.device = CPU,
    parallel: ParallelConfig | None = None,
    training: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    **model: Any,
) -> TransformerConfig:
    """Return the TransformerConfig of a small model with changes."""
    return transformer_config(
        ModelConfig(**(SIZES | model)),
        parallel or ParallelConfig(),
        TrainingConfig(**({"micro_batch_size": 1, "train_iters": 1} | (training or {}))),
        OptimizerConfig(**({"lr": 1e-3} | (optimizer or {}))),
        device,
    )
