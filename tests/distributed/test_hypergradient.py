"""A whole outer update of a real run, against the mathematics in float64.

A weighted step of plain SGD takes θ to θ'; the update's alignments are those of v at θ' and of gradients at θ; and with
them the closed form is the derivative of the target loss at θ' in the scores that weighted the step.

The model is a GPT: Hugging Face's Llama rounds its norms to fp32, too coarse for the central differences (1e-5)² exact.
"""

from __future__ import annotations

import pytest
import torch

from megatron_dwm.model.parameter_copy import ParameterCopy
from megatron_dwm.training.step import train_step
from megatron_dwm.weighting.bilevel.outer_update import OuterResult
from megatron_dwm.weighting.weighter import Weighter
from megatron_dwm.weighting.weights import target_score_gradient, weights_from_scores
from tests.distributed.built_model import (
    CONTEXT_PARALLEL,
    LAYOUTS,
    HfState,
    Reference,
    build_model,
    inner,
    random_mask,
    random_tokens,
    relative_error,
    uneven_mask,
)
from tests.distributed.harness import run_distributed
from tests.distributed.test_outer_update import _NoSchedule, classifier
from tests.small_runs import GPT, NUM_SAMPLES, Flags

RATE, TEMPERATURE = 0.1, 0.7
SGD = {"--optimizer": "sgd", "--sgd-momentum": 0, "--weight-decay": 0, "--lr": RATE}
SCORES = torch.randn(NUM_SAMPLES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


MASKS = {
    "equal": random_mask(2),
    "every second sample at 3 of 12 tokens": uneven_mask(3),
    "every second sample at 1 of 12 tokens": uneven_mask(1),
}


def weighted_step_and_update(flags: Flags, mask: torch.Tensor) -> tuple[HfState, HfState, OuterResult]:
    """θ, θ' and what the update found."""
    built = build_model({**flags, **SGD, "--dwm-preconditioner": "none"})
    outer = built.outer(Weighter(classifier(), built.config.weighting, torch.device("cpu")))
    batch, target = built.batch(random_tokens(1), mask), built.batch(random_tokens(5), mask.flip(0))
    u = built.sample_gather.select_replica(weights_from_scores(SCORES, TEMPERATURE))
    old, before = built.parameters(), ParameterCopy.of(built.chunks)
    train_step(built.engine, built.optimizer, _NoSchedule(), batch, 2, u)
    with built.engine.full_parameters():
        new = built.parameters()
        result = outer.run(batch, target, before)
    assert result is not None
    return old, new, result


def loss_factors(mask: torch.Tensor, is_per_token: bool) -> torch.Tensor:
    """What each sample's mean loss counts in Megatron-LM's reduction [N]; a microbatch is two consecutive samples."""
    tokens = mask.double().sum(dim=1)
    groups = tokens.view(1, -1) if is_per_token else tokens.view(-1, 2)
    return (groups / groups.mean(dim=1, keepdim=True)).flatten()


def target_loss(state: HfState, mask: torch.Tensor, is_per_token: bool) -> tuple[Reference, torch.Tensor]:
    reference = Reference(GPT, state)
    losses = reference.losses(random_tokens(5), mask.flip(0))
    return reference, (losses * loss_factors(mask.flip(0), is_per_token)).mean()


@pytest.mark.parametrize(
    ("layout", "masks", "is_per_token"),
    [
        ("one process", "every second sample at 3 of 12 tokens", True),
        ("PP2, interleaved", "equal", False),
        ("TP2 x PP2", "every second sample at 3 of 12 tokens", False),
        ("DP2", "every second sample at 1 of 12 tokens", False),
        ("DP2", "every second sample at 1 of 12 tokens", True),
        ("CP2", "every second sample at 3 of 12 tokens", False),
        ("PP2, interleaved, x CP2", "every second sample at 1 of 12 tokens", False),
        ("CP2 x DP2", "every second sample at 1 of 12 tokens", True),
    ],
)
def test_the_update_of_a_run_finds_the_derivative_of_the_target_loss_in_the_scores(
    layout: str, masks: str, is_per_token: bool
):
    """Without the factors of unequal masks the cosine of the two was 0.57 to 0.70 with these masks."""
    layouts = {**LAYOUTS, **CONTEXT_PARALLEL, "CP2 x DP2": (4, CONTEXT_PARALLEL["CP2"][1])}
    world, parallel = layouts[layout]
    mask = MASKS[masks]
    flags = {**GPT, **parallel, **({"--calculate-per-token-loss": True} if is_per_token else {})}
    results = run_distributed(weighted_step_and_update, world, flags, mask)
    old, new, _ = results[0]
    at_old, _ = target_loss(old, mask, is_per_token)
    factors = loss_factors(mask, is_per_token)
    losses = at_old.losses(random_tokens(1), mask) * factors
    gradients = [at_old.gradient(loss) for loss in losses]

    def stepped(scores: torch.Tensor) -> HfState:
        w = torch.softmax(scores / TEMPERATURE, 0)
        moves = {k: sum(wi * g[k] for wi, g in zip(w, gradients, strict=True)) for k in at_old.params}
        return {k: old[k].double() - RATE * moves[k] for k in at_old.params}

    exact = stepped(SCORES)
    moved = {k: new[k].double() - old[k].double() for k in exact}
    assert relative_error(moved, {k: exact[k] - old[k].double() for k in exact}) < 1e-4

    at_new, loss_after = target_loss(exact, mask, is_per_token)
    v = at_new.gradient(loss_after)
    alignments = torch.stack([inner(v, gradient) for gradient in gradients])
    differences = []
    for direction in 1e-5 * torch.eye(NUM_SAMPLES, dtype=torch.float64):
        above, below = (
            target_loss(stepped(SCORES + sign * direction), mask, is_per_token)[1].detach() for sign in (1, -1)
        )
        differences.append(float(above - below) / 2e-5)

    for _, _, result in results:
        assert result.target_loss == pytest.approx(loss_after.item(), abs=1e-5)
        assert float((result.alignments - alignments).abs().max()) < 1e-4 * float(alignments.abs().max())
        found = target_score_gradient(result.alignments, SCORES, TEMPERATURE, RATE)
        scale = max(map(abs, differences))
        assert scale > 1e-3
        assert found.tolist() == pytest.approx(differences, abs=2e-4 * scale)
