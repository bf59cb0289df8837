"""What a plan says of rules, which weigh without a weighter."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import pytest

from megatron_dwm.plan.plan import Plan, make_plan
from tests.small_runs import IN_PROCESS, LLAMA, parse_flags

RULES = ("random", "loss", "similarity", "source-alignment", "top-alignment")


def _plans() -> dict[str, Plan]:
    run = {**IN_PROCESS, **LLAMA, "--dwm-mode": "rule", "--dwm-update-interval": 2, "--dwm-num-stages": 1}
    run |= {"--dwm-warmup-iters": 2, "--use-distributed-optimizer": True, "--tensor-model-parallel-size": 2}
    return {rule: make_plan(parse_flags({**run, "--dwm-rule": rule}, 4)) for rule in RULES}


@pytest.fixture(scope="module")
def plans() -> Iterator[dict[str, Plan]]:
    with multiprocessing.get_context("fork").Pool(1) as other_process:  # which a plan changes
        yield other_process.apply(_plans)


@pytest.mark.parametrize(
    ("rule", "steps_for_weights", "steps_for_updates"),
    [
        ("random", 0, 0),
        ("loss", 1 / 3, 0),
        ("similarity", 1 / 3, 1 / 3),
        ("source-alignment", 0, 2),
        ("top-alignment", 2, 0),
    ],
)
def test_what_rules_take(rule: str, steps_for_weights: float, steps_for_updates: float, plans: dict[str, Plan]):
    plan = plans[rule]
    step = plan.step.operations
    assert plan.weighter is None
    assert plan.scoring.operations == pytest.approx(steps_for_weights * step)
    assert plan.update.operations == pytest.approx(steps_for_updates * step)
    assert plan.updates == ([4, 6, 8, 10] if steps_for_updates else [])
    added = (8 * steps_for_weights + 4 * steps_for_updates) / 10  # after two iterations of warm-up
    assert plan.overhead.operations == pytest.approx(added)
    assert (plan.overhead.sent > 0) == (added > 0)
    (memory,) = plan.memory
    # An alignment pass holds more than a training pass, and the parameters to go back to are held besides.
    assert (memory.weighting_in_update > 0) == rule.endswith("-alignment")
    if rule == "source-alignment":
        copied = memory.weights / 2  # over two replicas
        assert memory.weighting_in_update >= plans["top-alignment"].memory[0].weighting_in_update + copied
