"""Recomputed activations give the gradients of kept ones, bit for bit, with every layer backend of a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_dwm.config.parallel import ParallelConfig
from tests.distributed import tiny
from tests.distributed.harness import run_distributed

KINDS: dict[str, dict[str, Any]] = {
    "selective": {"recompute_granularity": "selective"},
    "selective, two modules": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "full, uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "full, block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
}
LAYOUTS = {"one process": (1, ParallelConfig()), "TP2": (2, ParallelConfig(tensor_model_parallel_size=2))}


def _trained(changes: dict[str, Any], parallel: ParallelConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tiny.initialize(parallel)
    # Dropout too: what is recomputed must drop the same.
    chunks, config = tiny.build(tiny.gpt(hidden_dropout=0.1, attention_dropout=0.1, **changes), parallel)
    losses, gradients = tiny.losses_and_gradients(chunks, config, parallel)
    assert losses is not None
    return losses, gradients


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", ["torch", "local"])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_changes_no_bit(kind: str, impl: str, layout: str):
    world, parallel = LAYOUTS[layout]
    kept = run_distributed(_trained, world, {"transformer_impl": impl}, parallel)
    recomputed = run_distributed(_trained, world, {"transformer_impl": impl} | KINDS[kind], parallel)
    for (losses, gradients), (found, found_gradients) in zip(kept, recomputed, strict=True):
        assert torch.equal(losses, found)
        assert all(torch.equal(gradients[key], found_gradients[key]) for key in gradients)
