"""Whole parameters and whole target gradients where their communication overlaps with the passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_dwm.model.parameter_copy import ParameterCopy
from megatron_dwm.training.step import train_step
from tests.distributed.built_model import HfState, Reference, build_model, random_mask, random_tokens, relative_error
from tests.distributed.harness import run_distributed
from tests.distributed.test_outer_update import _NoSchedule
from tests.small_runs import LLAMA, Flags

OVERLAPPED = {"--use-distributed-optimizer": True, "--overlap-grad-reduce": True, "--overlap-param-gather": True}
PIPELINE = {"--num-layers": 4, "--pipeline-model-parallel-size": 2, "--num-virtual-stages-per-pipeline-rank": 2}
LAYOUTS: dict[str, tuple[int, Flags]] = {
    "DP2": (2, OVERLAPPED),
    "PP2, interleaved, x DP2": (4, {**OVERLAPPED, **PIPELINE}),
    "PP2, interleaved, x DP2, not aligned": (
        4,
        {**OVERLAPPED, **PIPELINE, "--no-align-grad-reduce": True, "--no-align-param-gather": True},
    ),
}


def after_steps(flags: Flags) -> list[tuple[bool, bool, HfState, HfState]]:
    """After each of two steps: whether the parameters lay whole in the model, and in a copy, at once; θ and v.

    The first pass of a run reduces when all is done, later ones as the gradients come.
    """
    built = build_model({**flags, "--dwm-preconditioner": "none"})
    passes, seen = built.lm_gradients(), []
    target = built.batch(random_tokens(5), random_mask(6))
    for number in range(2):
        batch = built.batch(random_tokens(number), random_mask(2))
        train_step(built.engine, built.optimizer, _NoSchedule(), batch, 2, None)
        params = [param.data for chunk in built.chunks for param in chunk.parameters()]
        present = [param.clone() for param in params]
        copy = ParameterCopy.of(built.chunks)
        with built.engine.full_parameters(), built.engine.deterministic():
            whole = [param.clone() for param in params]
            _, direction = passes.gradient(target)
            state, v = built.parameters(), built.named(dict(direction))
            for param in params:
                param.zero_()
            copy.restore()
        copied = all(map(torch.equal, params, whole))
        seen.append((all(map(torch.equal, present, whole)), copied, state, v))
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_of_parameters_and_the_target_gradient_are_whole(layout: str):
    world, flags = LAYOUTS[layout]
    results: list[Any] = run_distributed(after_steps, world, {**LLAMA, **flags})
    # A step leaves some rank with other ranks' shards as they were before it, else this would show nothing.
    assert not all(result[1][0] for result in results)
    for number in range(2):
        reference = Reference(LLAMA, results[0][number][2])
        v = reference.gradient(reference.losses(random_tokens(5), random_mask(6)).mean())
        for result in results:
            _, copied, _, found = result[number]
            assert copied
            assert relative_error(found, v) < 5e-5
