"""P v with Adam's P, against 1 / (sqrt(second moment, bias-corrected) + ε) of a plain torch Adam."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_dwm.benchmarks.measuring import peak_and_retained
from megatron_dwm.model.optimizer_parts import optimizer_parts
from megatron_dwm.training.step import train_step
from megatron_dwm.weighting.bilevel.gradient_buffers import GradientBuffers
from megatron_dwm.weighting.bilevel.preconditioner import precondition
from tests.distributed.built_model import (
    CONTEXT_PARALLEL,
    LAYOUTS,
    BuiltModel,
    HfState,
    build_model,
    random_mask,
    random_tokens,
    relative_error,
)
from tests.distributed.harness import run_distributed
from tests.distributed.test_outer_update import _NoSchedule
from tests.small_runs import LLAMA, Flags

STEPS = 3


def preconditioned(flags: Flags) -> tuple[list[HfState], HfState, HfState]:
    """The gradients of some steps, v, and P v."""
    built = build_model({**flags, "--adam-beta2": 0.9, "--weight-decay": 0, "--no-bias-swiglu-fusion": True})
    gradients = []
    for number in range(STEPS):
        batch = built.batch(random_tokens(number), random_mask(2))
        train_step(built.engine, built.optimizer, _NoSchedule(), batch, 2, None)
        gradients.append(built.gradient())
    buffers = _filled(built, torch.randn)
    for v in buffers.direction.values():
        torch.distributed.broadcast(v, 0)
    before = built.named({param: v.clone() for param, v in buffers.direction.items()})
    precondition(buffers.direction, built.optimizer)
    buffers.gather_shards()
    return gradients, before, built.named(dict(buffers.direction))


def _filled(built: BuiltModel, make: Callable[..., torch.Tensor]) -> GradientBuffers:
    """The model's gradient buffers, with a made-up v in them."""
    buffers = GradientBuffers(built.chunks)
    for v in buffers.direction.values():
        v.copy_(make(v.shape))
    return buffers


@pytest.mark.parametrize(
    ("layout", "changes", "tolerance"),
    [
        ("one process", {}, 1e-5),
        # Whose elements of tokens that occur once have no gradient.
        ("one process", {"--hidden-dropout": 0.5}, 1e-5),
        ("DP2", {}, 1e-5),
        ("DP2, distributed optimizer", {}, 1e-5),
        ("CP2", {"--use-distributed-optimizer": True}, 1e-5),
        # The result is handed back through bf16 parameters here, which keep 8 bits.
        ("one process", {"--bf16": True}, 1e-2),
        ("DP2, distributed optimizer", {"--bf16": True}, 1e-2),
    ],
)
def test_the_direction_is_scaled_by_adams_second_moment(layout: str, changes: Flags, tolerance: float):
    world, parallel = (LAYOUTS | CONTEXT_PARALLEL)[layout]
    for gradients, v, found in run_distributed(preconditioned, world, {**LLAMA, **parallel, **changes}):
        expected = {}
        for name, value in v.items():
            second = torch.zeros_like(value, dtype=torch.float64)
            for gradient in gradients:
                second = 0.9 * second + 0.1 * gradient[name].double() ** 2
            scaled = value.double() / ((second / (1 - 0.9**STEPS)).sqrt() + 1e-8)
            expected[name] = torch.where(second > 0, scaled, 0)  # what has no gradient moves with no sample's weight
        assert (expected["embed_tokens.weight"] == 0).any()
        assert relative_error(found, expected) < tolerance


def test_target_tokens_that_training_has_not_seen_leave_finite_differences_exact():
    """P would be 1 / ε for them, and the direction nearly all theirs. As in test_alignment.py to 1e-2, of curvature."""

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        built = build_model(LLAMA)
        batch = built.batch(random_tokens(1) % 20, random_mask(2))
        target = built.batch(random_tokens(5), random_mask(6))
        train_step(built.engine, built.optimizer, _NoSchedule(), batch, 2, None)
        passes = built.lm_gradients()
        with built.engine.deterministic():
            _, direction = passes.gradient(target)
            return passes.align(batch, direction), passes._align_by_differences(batch, direction)

    ((exact, differences),) = run_distributed(both, 1)
    assert float((exact - differences).abs().max()) < 1e-2 * float(exact.abs().max())


def test_parameters_with_a_learning_rate_of_their_own_have_it_in_p():
    def ratio(rates: Flags) -> dict[str, torch.Tensor]:
        built = build_model({**LLAMA, **rates})
        batch = built.batch(random_tokens(1), random_mask(2))
        train_step(built.engine, built.optimizer, _NoSchedule(), batch, 2, None)
        direction = _filled(built, torch.ones).direction
        precondition(direction, built.optimizer)
        return built.named(dict(direction))

    (plain,) = run_distributed(ratio, 1, {})
    (decoupled,) = run_distributed(ratio, 1, {"--decoupled-lr": 0.03})  # of the --lr 0.01 of IN_PROCESS
    for name, value in plain.items():
        factor = 3.0 if name in ("embed_tokens.weight", "lm_head.weight") else 1.0
        torch.testing.assert_close(decoupled[name], factor * value, rtol=1e-6, atol=0)


def test_scaling_takes_no_more_memory_than_the_largest_parameter():
    """Where microbatches are small, more would be the peak of an update. 1.1: the tolerance is for scalars."""

    def peak_and_largest() -> tuple[int, int]:
        built = build_model({**LLAMA, "--num-layers": 4})
        batch = built.batch(random_tokens(1), random_mask(2))
        train_step(built.engine, built.optimizer, _NoSchedule(), batch, 2, None)
        direction = _filled(built, torch.ones).direction
        peak, _ = peak_and_retained(lambda: precondition(direction, built.optimizer))
        sizes = [v.nbytes for v in direction.values()]
        assert sum(sizes) > 4 * max(sizes)
        return peak, max(sizes)

    ((peak, largest),) = run_distributed(peak_and_largest, 1)
    assert largest <= peak <= 1.1 * largest


@pytest.mark.parametrize("layout", ["one process", "DP2, distributed optimizer"])
def test_before_the_optimizers_first_step_the_direction_is_unknown(layout: str):
    def all_nan() -> bool:
        built = build_model({**LLAMA, **LAYOUTS[layout][1]})
        buffers = _filled(built, torch.ones)
        precondition(buffers.direction, built.optimizer)
        buffers.gather_shards()
        return all(bool(v.isnan().all()) for v in buffers.direction.values())

    assert all(run_distributed(all_nan, LAYOUTS[layout][0]))


def test_every_instance_of_the_optimizer_holds_all_of_its_state():
    def held() -> tuple[int, int]:
        instances = {"--use-distributed-optimizer": True, "--num-distributed-optimizer-instances": 2}
        built = build_model({**LLAMA, **instances})
        parts = [part.optimizer for part in optimizer_parts(built.optimizer)]
        own = sum(param.numel() for part in parts for group in part.param_groups for param in group["params"])
        return own, sum(param.numel() for chunk in built.chunks for param in chunk.parameters())

    (first, total), (second, _), *others = run_distributed(held, 4)
    assert 0 < first < total and first + second == total
    assert [own for own, _ in others] == [first, second]


def test_weight_decay_concerns_the_weights_of_the_norms_of_queries_and_keys_if_asked():
    def decayed(flags: Flags) -> set[str]:
        built = build_model({**LLAMA, "--qk-layernorm": True, **flags})
        groups = [group for part in optimizer_parts(built.optimizer) for group in part.optimizer.param_groups]
        held = {param for group in groups if group["wd_mult"] for param in group["params"]}
        named = [item for chunk in built.chunks for item in chunk.named_parameters()]
        return {name for name, param in named if param in held and "norm" in name}

    asked = ({}, {"--apply-wd-to-qk-layernorm": True}, {"--no-weight-decay-cond-type": "apply_wd_to_qk_layernorm"})
    ((plain, found, former),) = run_distributed(lambda: [decayed(flags) for flags in asked], 1)
    assert plain == set() and found == former and len(found) == 4
    assert all(name.endswith(("q_layernorm.weight", "k_layernorm.weight")) for name in found)
