"""Recomputed activations give the gradients and the alignments of kept ones, bit for bit, with the layers of a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import parallel_state as mpu

from megatron_dwm.model.loss import weighted_loss
from tests.distributed.built_model import LAYOUTS, build_model, random_mask, random_tokens
from tests.distributed.harness import run_distributed
from tests.small_runs import GPT, OLMO2, Flags

SELECTIVE: dict[str, Any] = {"--recompute-granularity": "selective"}
FULL: dict[str, Any] = {"--recompute-granularity": "full", "--recompute-num-layers": 1}
KINDS: dict[str, dict[str, Any]] = {
    "core attention": {"--recompute-activations": True},
    "core attention, MLP": {**SELECTIVE, "--recompute-modules": ["core_attn", "mlp"]},
    "full, uniform": {**FULL, "--recompute-method": "uniform"},
    "full, uniform, by two": {**FULL, "--recompute-method": "uniform", "--recompute-num-layers": 2},
    "full, block": {**FULL, "--recompute-method": "block"},
}
SPREAD: dict[str, Any] = {**KINDS["full, uniform"], "--distribute-saved-activations": True}
CASES = [
    (GPT, "torch", "TP2"),
    (GPT, "torch", "TP2, sequence parallel"),
    (GPT, "torch", "PP2, interleaved"),
    (GPT, "local", "TP2"),
    (OLMO2, "torch", "TP2, sequence parallel"),
]


def _all_passes(every: list[Flags]) -> list[list[torch.Tensor]]:
    """:func:`_passes` of each of several models, built one after the other."""
    found = []
    for flags in every:
        found.append(_passes(flags))
        mpu.destroy_model_parallel()
    return found


def _passes(flags: Flags) -> list[torch.Tensor]:
    """This rank's gradients of two passes with dropout, the random state after them, and alignments."""
    built, found = build_model(flags), []
    for seed in range(2):
        batch = built.batch(random_tokens(seed), random_mask(seed))
        for chunk in built.chunks:
            chunk.zero_grad_buffer()
        built.engine.run(batch, built.config.training.micro_batch_size, loss_function=weighted_loss(None))
        found += [param.main_grad.clone() for chunk in built.chunks for param in chunk.parameters()]
    found.append(torch.get_rng_state())
    lm_gradients = built.lm_gradients()
    _, direction = lm_gradients.gradient(batch)
    return [*found, lm_gradients.align(batch, direction)]


@pytest.mark.parametrize("model, impl, layout", CASES)
def test_recomputing_changes_no_bit(model: Flags, impl: str, layout: str):
    world, parallel = LAYOUTS[layout]
    flags = {"--hidden-dropout": 0.1, "--attention-dropout": 0.1, "--micro-batch-size": 4}
    common = {**model, **parallel, **flags, "--transformer-impl": impl, "--dwm-preconditioner": "none"}
    kinds = {**KINDS, "full, saved activations spread": SPREAD} if layout == "TP2" else KINDS
    if "PP2" in layout:  # its chunks have one layer
        kinds = {kind: flags for kind, flags in kinds.items() if flags.get("--recompute-num-layers") != 2}
    for kept, *recomputed in run_distributed(
        _all_passes, world, [common, *({**common, **kinds[kind]} for kind in kinds)]
    ):
        for kind, found in zip(kinds, recomputed, strict=True):
            assert all(torch.equal(*pair) for pair in zip(kept, found, strict=True)), kind
