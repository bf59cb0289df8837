"""The running mean of the target gradient, where ranks hold shards of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_dwm.weighting.bilevel.gradient_buffers import GradientBuffers
from megatron_dwm.weighting.bilevel.gradient_mean import GradientMean
from tests.distributed.built_model import build_model, random_mask, random_tokens
from tests.distributed.harness import run_distributed
from tests.small_runs import LLAMA, Flags

MOMENTUM = 0.6
FLAGS: Flags = {**LLAMA, "--use-distributed-optimizer": True, "--dwm-preconditioner": "none"}


def _averaged(flags: Flags) -> dict[str, Any]:
    """Return on this rank single gradients, their running means, and what a mean does that was loaded."""
    built = build_model(flags)
    alone, averaging = built.lm_gradients(), built.lm_gradients()
    targets = [built.batch(random_tokens(seed), random_mask(seed)) for seed in (1, 2, 3)]
    averaging.gradient_mean = GradientMean(built.chunks, MOMENTUM)

    def found(passes: Any, target: Any) -> list[torch.Tensor]:
        return [v.clone() for v in passes.gradient(target)[1].values()]

    assert averaging.gradient_mean.state() is None
    singles = [found(alone, target) for target in targets]
    means = [found(averaging, target) for target in targets[:2]]
    state = averaging.gradient_mean.state()
    assert state is not None
    last = found(averaging, targets[2])
    averaging.gradient_mean = GradientMean(built.chunks, MOMENTUM)
    averaging.gradient_mean.load(*state)
    resumed = found(averaging, targets[2])
    parameter = next(built.chunks[0].parameters())
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.fill_(torch.nan)
    overflowed = found(averaging, targets[0])
    with torch.no_grad():
        parameter.copy_(kept)
    found(alone, targets[0])
    gradients = GradientBuffers(built.chunks)
    if dist.get_rank() == 0:  # in whose shards alone a number overflows
        gradients.shards()[0][0] = torch.inf
    averaging.gradient_mean.average(gradients)
    skipped = [shard.clone() for shard in gradients.shards()]
    after = averaging.gradient_mean.state()
    averaging.gradient_mean = GradientMean(built.chunks, MOMENTUM)
    averaging.gradient_mean.load(*state)
    found(averaging, targets[2])
    expected = averaging.gradient_mean.state()
    assert after is not None and expected is not None
    return {
        "singles": singles,
        "means": [*means, last],
        "resumed": resumed,
        "overflowed": bool(torch.stack([v.isfinite().all() for v in overflowed]).all()),
        "skipped": all(bool(shard.isnan().all()) for shard in skipped),
        "forgets": after[0] == expected[0] and all(torch.equal(after[1][p], expected[1][p]) for p in after[1]),
    }


def test_gradients_are_averaged_kept_and_what_overflowed_is_forgotten():
    for found in run_distributed(_averaged, 2, FLAGS):
        factors = [MOMENTUM**age * (1 - MOMENTUM) for age in range(3)]
        for count, means in enumerate(found["means"], start=1):
            used = factors[:count][::-1]
            for number, mean in enumerate(means):
                terms = [factor * single[number] for factor, single in zip(used, found["singles"][:count], strict=True)]
                torch.testing.assert_close(mean, sum(terms) / sum(used), rtol=1e-4, atol=1e-7)
        for one, other in zip(found["means"][2], found["resumed"], strict=True):
            assert torch.equal(one, other)
        assert not found["overflowed"] and found["skipped"] and found["forgets"]
