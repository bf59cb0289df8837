"""Outer updates of fp16 training: the loss scale is undone, and what overflows under it is skipped on all ranks."""

from __future__ import annotations

import pytest
import torch

from megatron_dwm.model.optimizer_parts import optimizer_parts
from megatron_dwm.model.parameter_copy import ParameterCopy
from megatron_dwm.training.step import train_step
from megatron_dwm.weighting.weighter import Weighter
from tests.distributed.built_model import (
    LAYOUTS,
    Reference,
    build_model,
    inner,
    random_mask,
    random_tokens,
    relative_error,
)
from tests.distributed.harness import run_distributed
from tests.distributed.test_alignment import align
from tests.distributed.test_outer_update import _NoSchedule, classifier, fingerprint
from tests.small_runs import LLAMA, Flags

FP16 = {**LLAMA, "--fp16": True}


def test_the_loss_scale_is_undone():
    """fp16 keeps 11 bits, 5e-4; errors add up to some 6e-3 over four layers. A scale left in would be a factor."""
    ((state, found_v, exact, _, _),) = run_distributed(align, 1, {**FP16, "--loss-scale": 512})
    reference = Reference(LLAMA, state)
    v = reference.gradient(reference.losses(random_tokens(5), random_mask(6)).mean())
    losses = reference.losses(random_tokens(1), random_mask(2))
    expected = torch.stack([inner(v, reference.gradient(loss)) for loss in losses])
    assert relative_error(found_v, v) < 3e-2
    assert float((exact - expected).abs().max()) < 3e-2 * float(expected.abs().max())


def overflows(flags: Flags) -> list[tuple[bool, bool, bool, bool]]:
    """Of three updates: whether the step before was made, the update was, the weighter changed, anything else did."""
    built = build_model({**FP16, **flags, "--initial-loss-scale": 1e30, "--hysteresis": 1})
    weighter = Weighter(classifier(), built.config.weighting, torch.device("cpu"))
    outer, seen = built.outer(weighter), []
    (scaler,) = (part.grad_scaler for part in optimizer_parts(built.optimizer))
    batch, target = built.batch(random_tokens(1), random_mask(2)), built.batch(random_tokens(5), random_mask(6))
    # Too large a scale for the step; for the update alone; for neither.
    for for_step, for_update in ((1e30, 1e30), (64.0, 1e30), (64.0, 64.0)):
        before = ParameterCopy.of(built.chunks)
        scaler._scale.fill_(for_step)
        step = train_step(built.engine, built.optimizer, _NoSchedule(), batch, 2, None)
        scaler._scale.fill_(for_update)
        with built.engine.full_parameters():
            first, replay, digest = fingerprint(built), len(outer.replay), weighter.hash()
            result = outer.run(batch, target, before)
            changed = fingerprint(built) != first
        assert (len(outer.replay) == replay) == (result is None)
        seen.append((not step.skipped, result is not None, weighter.hash() != digest, changed))
    return seen


@pytest.mark.parametrize("layout", ["TP2 x PP2", "DP2, distributed optimizer"])
def test_an_update_that_overflows_is_skipped_on_all_ranks_and_changes_nothing(layout: str):
    world, parallel = LAYOUTS[layout]
    for seen in run_distributed(overflows, world, parallel):
        assert seen == [(False, False, False, False), (True, False, False, False), (True, True, True, False)]


def test_an_alignment_that_is_not_finite_ends_a_run_that_checks_for_it():
    def diverge() -> str:
        built = build_model(LLAMA)
        outer = built.outer(Weighter(classifier(), built.config.weighting, torch.device("cpu")))
        batch, target = built.batch(random_tokens(1), random_mask(2)), built.batch(random_tokens(5), random_mask(6))
        # Before its first step Adam has no second moment to scale the target gradient by.
        with pytest.raises(FloatingPointError, match="an alignment is not finite"):
            outer.run(batch, target, ParameterCopy.of(built.chunks))
        return "raised"

    assert run_distributed(diverge, 1) == ["raised"]
