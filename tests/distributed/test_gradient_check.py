"""--dwm-check: passes in every layout, leaves everything as it was, and notices alignments and steps that are wrong.

Errors are relative, in fp32. Measured here: 1.4e-3 and less with exact alignments (most of it is the curvature of the
softmax over scores), 6.6e-3 and less with alignments from finite differences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from megatron_dwm.data.batch import Batch
from megatron_dwm.errors import UserError
from megatron_dwm.training.step import train_step
from megatron_dwm.weighting.bilevel.alignment import Direction
from megatron_dwm.weighting.bilevel.gradient_check import (
    TOLERANCE,
    HypergradientCheck,
    check_at_start,
    check_hypergradient,
)
from megatron_dwm.weighting.bilevel.lm_gradients import LMGradients
from tests.distributed.built_model import (
    COMBINED,
    CONTEXT_PARALLEL,
    LAYOUTS,
    BuiltModel,
    build_model,
    random_mask,
    random_tokens,
)
from tests.distributed.harness import run_distributed
from tests.distributed.test_outer_update import _NoSchedule, fingerprint
from tests.small_runs import GPT, LLAMA, NUM_SAMPLES, SEQ_LENGTH, Flags

DROPOUT = {"--hidden-dropout": 0.2, "--attention-dropout": 0.2}


def unequal_mask() -> torch.Tensor:
    """[N, s] with 0 to 4 tokens masked."""
    mask = torch.ones(NUM_SAMPLES, SEQ_LENGTH)
    for sample in range(NUM_SAMPLES):
        mask[sample, : sample % 5] = 0
    return mask


def batches(built: BuiltModel, mask: torch.Tensor) -> tuple[Batch, Batch]:
    return built.batch(random_tokens(1), mask), built.batch(random_tokens(5), mask.flip(0))


def checked(
    flags: Flags, steps: int, mask: torch.Tensor, kinds: Sequence[type[LMGradients]] = (LMGradients,)
) -> list[tuple[HypergradientCheck, bool]]:
    """What checks after ``steps`` training steps find, one of each kind, and whether they changed anything."""
    built = build_model({**flags, **({} if steps else {"--dwm-preconditioner": "none"})})
    batch, target = batches(built, mask)
    for _ in range(steps):
        train_step(built.engine, built.optimizer, _NoSchedule(), batch, 2, None)
    before = fingerprint(built) if not built.config.parallel.overlap_param_gather else None
    found = []
    for kind in kinds:
        result = check_hypergradient(built.lm_gradients(kind), built.sample_gather, batch, target)
        found.append((result, before is None or fingerprint(built) == before))
    return found


@pytest.mark.parametrize("layout", ["one process", *COMBINED, "CP2"])
def test_it_passes_in_every_layout_and_changes_nothing(layout: str):
    world, parallel = (LAYOUTS | CONTEXT_PARALLEL)[layout]
    results = run_distributed(checked, world, {**LLAMA, **parallel, **DROPOUT}, 0, random_mask(2))
    for ((found, unchanged),) in results:
        assert unchanged and found.passed and found.error < 2e-3
        assert found == results[0][0][0] and found.derivative > 0


@pytest.mark.parametrize(
    ("steps", "flags", "mask", "tolerance"),
    [
        (2, {}, random_mask(2), 2e-3),
        (2, {"--calculate-per-token-loss": True}, unequal_mask(), 2e-3),
        (0, {}, unequal_mask(), 2e-3),
        (0, {"--dwm-alignment": "finite-difference", "--dwm-temperature": 3}, random_mask(2), TOLERANCE),
    ],
    ids=["Adam's preconditioner", "loss per token", "samples of unequal length", "finite differences"],
)
def test_it_passes_with_other_flags(steps: int, flags: Flags, mask: torch.Tensor, tolerance: float):
    world, parallel = LAYOUTS["DP2, distributed optimizer"]
    for ((found, unchanged),) in run_distributed(checked, world, {**GPT, **parallel, **flags}, steps, mask):
        assert unchanged and found.error < tolerance


class SamplesMixedUp(LMGradients):
    def align(self, batch: Batch, direction: Direction) -> torch.Tensor:
        return super().align(batch, direction).roll(1)


class WithoutTheFirstParameter(LMGradients):
    def align(self, batch: Batch, direction: Direction) -> torch.Tensor:
        first = next(iter(direction))
        return super().align(batch, {**direction, first: torch.zeros_like(direction[first])})


class TwiceAsLarge(LMGradients):
    def align(self, batch: Batch, direction: Direction) -> torch.Tensor:
        return 2 * super().align(batch, direction)


class OfOneSampleMissing(LMGradients):
    def align(self, batch: Batch, direction: Direction) -> torch.Tensor:
        alignments = super().align(batch, direction)
        alignments[0] = alignments[1:].mean()
        return alignments


class WeightsMixedUp(LMGradients):
    def gradient(self, batch: Batch, sample_weights: torch.Tensor | None = None) -> tuple[float, Direction]:
        return super().gradient(batch, None if sample_weights is None else sample_weights.flip(0))


class LossThatIgnoresWeights(LMGradients):
    def gradient(self, batch: Batch, sample_weights: torch.Tensor | None = None) -> tuple[float, Direction]:
        return super().gradient(batch)


WRONG = [
    SamplesMixedUp,
    WithoutTheFirstParameter,
    TwiceAsLarge,
    OfOneSampleMissing,
    WeightsMixedUp,
    LossThatIgnoresWeights,
]


def test_it_notices_an_alignment_or_a_step_that_is_wrong():
    for results in run_distributed(checked, 2, LLAMA, 0, random_mask(2), WRONG):
        for kind, (found, unchanged) in zip(WRONG, results, strict=True):
            assert unchanged and not found.passed and found.error > 1.5 * TOLERANCE, kind


def refusal(flags: Flags, spoil: Callable[[BuiltModel], None], mask: torch.Tensor) -> str:
    built = build_model(flags)
    spoil(built)
    batch, target = batches(built, mask)
    with pytest.raises(UserError) as caught:
        check_at_start(built.lm_gradients(), built.sample_gather, batch, target)
    return str(caught.value)


def mark_all_parameters_as_shards(built: BuiltModel) -> None:
    """As a layer might that does not know of tensor parallelism: what the ranks hold in common is counted twice."""
    for chunk in built.chunks:
        for param in chunk.parameters():
            param.tensor_model_parallel = True


def test_parameters_with_wrong_marks_end_the_run_on_all_ranks():
    world, parallel = LAYOUTS["TP2"]
    flags = {**GPT, **parallel, "--dwm-alignment": "single-sample"}
    for message in run_distributed(refusal, world, flags, mark_all_parameters_as_shards, random_mask(2)):
        assert message.startswith("--dwm-check: hypergradient") and f"(bound {TOLERANCE:g})" in message


def test_a_target_set_without_a_loss_leaves_nothing_to_check():
    (message,) = run_distributed(refusal, 1, GPT, lambda built: None, torch.zeros(NUM_SAMPLES, SEQ_LENGTH))
    assert message.startswith("--dwm-check: the hypergradient of the first 8 samples is zero")
