"""The target gradient v and the alignments a_i = ⟨v, ∇ l_i⟩, in every layout, against autograd in float64.

fp32 against float64: v to 2e-5, alignments to 1e-4 of the largest (sums of products of two such gradients, which
cancel). The finite difference moves θ by 0.01; its error is that of the curvature, 1e-2 of the largest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_dwm.weighting.bilevel.alignment import global_norm
from megatron_dwm.weighting.bilevel.sample_products import has_supported_layers
from tests.distributed.built_model import (
    COMBINED,
    CONTEXT_PARALLEL,
    LAYOUTS,
    HfState,
    Reference,
    build_model,
    inner,
    random_mask,
    random_tokens,
    relative_error,
)
from tests.distributed.harness import run_distributed
from tests.small_runs import GPT, LLAMA, OLMO2, Flags

FULL = {"--recompute-granularity": "full", "--recompute-method": "uniform", "--recompute-num-layers": 1}
SELECTIVE = {"--recompute-granularity": "selective", "--recompute-modules": ["mlp", "core_attn"]}
UNTIED = {"--untie-embeddings-and-output-weights": True}
MODELS: dict[str, Flags] = {
    "gpt, tied": GPT,
    "gpt, untied": {**GPT, **UNTIED},
    "llama, untied": LLAMA,
    "olmo2": OLMO2,
    "olmo2, one group": {**OLMO2, "--num-query-groups": 1},
    "llama, tied": {**LLAMA, "--untie-embeddings-and-output-weights": False},
}


def align(flags: Flags) -> tuple[HfState, HfState, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The model, v, exact and finite-difference alignments of the whole batch, the mean target loss and v's norm."""
    built = build_model({**flags, "--dwm-preconditioner": "none"})
    passes = built.lm_gradients()
    state = built.parameters()
    batch, target = built.batch(random_tokens(1), random_mask(2)), built.batch(random_tokens(5), random_mask(6))
    with built.engine.full_parameters(), built.engine.deterministic():
        loss, direction = passes.gradient(target)
        exact = built.sample_gather.gather_from_replicas(passes.align(batch, direction))
        assert has_supported_layers(built.engine.chunks)
        single = passes.with_config(replace(built.config.weighting, dwm_alignment="single-sample"))
        singly = built.sample_gather.gather_from_replicas(single.align(batch, direction))
        # Two sums of the same products, in another order; fp16 keeps 11 bits.
        tolerance = 1e-3 if built.config.optimizer.fp16 else 1e-5
        assert float((singly - exact).abs().max()) < tolerance * float(singly.abs().max())
        differences = built.sample_gather.gather_from_replicas(passes._align_by_differences(batch, direction))
        norm = global_norm(direction, built.parallel_state)
    return state, built.named(dict(direction)), exact, differences, torch.tensor([loss, norm])


def check(model: Flags, results: list[Any]) -> None:
    reference = Reference(model, results[0][0])
    target_loss = reference.losses(random_tokens(5), random_mask(6)).mean()
    v = reference.gradient(target_loss)
    losses = reference.losses(random_tokens(1), random_mask(2))
    expected = torch.stack([inner(v, reference.gradient(loss)) for loss in losses])
    largest = float(expected.abs().max())
    assert largest > 0.1
    for _, found_v, exact, differences, (loss, norm) in results:
        assert abs(float(loss - target_loss.detach())) < 1e-5
        assert float(norm) == pytest.approx(float(inner(v, v)) ** 0.5, rel=2e-5)
        assert relative_error(found_v, v) < 2e-5
        assert float((exact - expected).abs().max()) < 1e-4 * largest
        assert float((differences - expected).abs().max()) < 1e-2 * largest
        assert not torch.equal(exact, differences)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        *(("gpt, tied", layout) for layout in COMBINED),
        *(("llama, untied", layout) for layout in ("one process", "DP2", "DP2, distributed optimizer", *COMBINED)),
        ("gpt, untied", "PP2, interleaved"),
        ("llama, tied", "TP2 x PP2"),
        ("olmo2", "TP2 x PP2"),
        ("olmo2, one group", "TP2, sequence parallel, x DP2, distributed optimizer, overlapped"),
        ("gpt, tied", "CP2"),
        ("olmo2", "CP2"),
        *(("llama, untied", layout) for layout in CONTEXT_PARALLEL if layout != "CP2"),
    ],
)
def test_alignments_in_every_layout(model: str, layout: str):
    world, parallel = (LAYOUTS | CONTEXT_PARALLEL)[layout]
    check(MODELS[model], run_distributed(align, world, {**MODELS[model], **parallel}))


@pytest.mark.parametrize("recomputation", [FULL, SELECTIVE], ids=["full", "selective"])
def test_recomputed_activations_under_context_parallelism(recomputation: Flags):
    """In other layouts they change no bit (test_recomputation.py)."""
    world, parallel = CONTEXT_PARALLEL["CP2"]
    check(LLAMA, run_distributed(align, world, {**LLAMA, **recomputation, **parallel}))


def test_overlapped_pipelines_of_two_replicas():
    _, parallel = LAYOUTS["PP2"]
    overlapped = {"--use-distributed-optimizer": True, "--overlap-grad-reduce": True, "--overlap-param-gather": True}
    check(LLAMA, run_distributed(align, 4, {**LLAMA, **parallel, **overlapped}))


@pytest.mark.parametrize("flags", [{"--calculate-per-token-loss": True}, {"--ddp-average-in-collective": True}])
def test_other_ways_to_average_gradients(flags: Flags):
    check(GPT, run_distributed(align, 2, {**GPT, **flags}))


@pytest.mark.parametrize("parallel", [{}, {"--sequence-parallel": True}], ids=["TP2", "TP2, sequence parallel"])
def test_what_heads_have_of_their_own_counts_on_every_rank_of_heads(parallel: Flags):
    """Along v of these parameters alone, where a part left out would show; against differences, to their curvature."""

    def both(flags: Flags, names: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        built = build_model({**LLAMA, **flags, "--tensor-model-parallel-size": 2, **parallel})
        passes = built.lm_gradients()
        of_heads = {
            param: 10 * torch.ones_like(param) * any(part in name for part in names)
            for chunk in built.chunks
            for name, param in chunk.named_parameters()
        }
        batch = built.batch(random_tokens(1), random_mask(2))
        with built.engine.deterministic():
            return passes.align(batch, of_heads), passes._align_by_differences(batch, of_heads)

    def all_kinds() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [
            both({"--qk-layernorm": True}, ("q_layernorm", "k_layernorm")),
            both(OLMO2, ("q_layernorm", "k_layernorm")),
            both(OLMO2, ("post_layernorm",)),
            both({"--softmax-type": "learnable"}, ("softmax_offset",)),
        ]

    for kinds in run_distributed(all_kinds, 2):
        for exact, differences in kinds:
            assert float((exact - differences).abs().max()) < 1e-2 * float(exact.abs().max())
            assert float(exact.abs().max()) > 0.1
