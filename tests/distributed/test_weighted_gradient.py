"""The gradient of the weighted loss, in every layout, against autograd of Σ w_i l_i in float64 on one process.

megatron-core's schedules and losses run in fp32 here; the tolerance 2e-5 is some hundred roundings of fp32 (6e-8)
through four layers.
"""

from __future__ import annotations

import pytest
import torch

from megatron_dwm.model.loss import weighted_loss
from tests.distributed.built_model import (
    COMBINED,
    LAYOUTS,
    HfState,
    Reference,
    build_model,
    random_mask,
    random_tokens,
    relative_error,
)
from tests.distributed.harness import run_distributed
from tests.small_runs import GPT, LLAMA, NUM_SAMPLES, Flags

TOLERANCE = 2e-5
MODELS = {"gpt, tied": GPT, "llama, untied": LLAMA}


def weights_from_scores() -> torch.Tensor:
    """u = N w [N] of random scores."""
    scores = torch.randn(NUM_SAMPLES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return NUM_SAMPLES * torch.softmax(1.5 * scores, 0)


def weighted_gradient(flags: Flags, u: torch.Tensor | None, mask: torch.Tensor) -> tuple[HfState, HfState]:
    built = build_model(flags)
    state = built.parameters()
    batch = built.batch(random_tokens(1), mask)
    sample_weights = built.sample_gather.select_replica(u) if u is not None else None
    for chunk in built.chunks:
        chunk.zero_grad_buffer()
    built.engine.run(batch, built.config.training.micro_batch_size, loss_function=weighted_loss(sample_weights))
    return state, built.gradient()


@pytest.mark.parametrize(
    ("model", "layout"),
    [("gpt, tied", "TP2 x PP2"), *(("llama, untied", layout) for layout in ("one process", "DP2", *COMBINED))],
)
def test_the_gradient_is_that_of_the_weighted_sum(model: str, layout: str):
    world, parallel = LAYOUTS[layout]
    mask, u = random_mask(2), weights_from_scores()
    results = run_distributed(weighted_gradient, world, {**MODELS[model], **parallel}, u, mask)
    reference = Reference(MODELS[model], results[0][0])
    expected = reference.gradient((u / NUM_SAMPLES * reference.losses(random_tokens(1), mask)).sum())
    for _, found in results:
        assert relative_error(found, expected) < TOLERANCE


def test_weights_of_exactly_one_change_no_bit():
    mask = random_mask(2)
    ((_, plain),) = run_distributed(weighted_gradient, 1, LLAMA, None, mask)
    ((_, weighted),) = run_distributed(weighted_gradient, 1, LLAMA, torch.ones(NUM_SAMPLES, dtype=torch.float64), mask)
    assert all(torch.equal(weighted[name], value) for name, value in plain.items())


def test_samples_of_unequal_length_count_by_their_tokens_in_a_microbatch_as_in_megatron():
    u = weights_from_scores()
    mask = random_mask(4, masked=0)
    for sample in range(NUM_SAMPLES):
        mask[sample, : sample % 4] = 0
    ((state, found),) = run_distributed(weighted_gradient, 1, LLAMA, u, mask)
    reference = Reference(LLAMA, state)
    summed = (reference.token_losses(random_tokens(1)) * mask).sum(1) * u
    of_microbatches = summed.view(-1, 2).sum(1) / mask.view(-1, 2 * mask.shape[1]).sum(1)
    assert relative_error(found, reference.gradient(of_microbatches.mean())) < TOLERANCE
