"""When the weighter weighs, learns and is exported."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.errors import UserError
from megatron_dwm.weighting.stage_schedule import bilevel_stages, frozen_stages

CONFIG = WeightingConfig(
    dwm_warmup_iters=4, dwm_num_stages=3, dwm_stage_update_iters=4, dwm_update_interval=2, dwm_target_data_path=["x"]
)


def iterations(holds, train_iters: int = 21) -> list[int]:
    return [iteration for iteration in range(1, train_iters + 1) if holds(iteration)]


def test_stages_follow_the_warm_up_and_the_last_takes_the_rest():
    stages = bilevel_stages(CONFIG, 21)
    assert [stages.stage(i) for i in range(1, 22)] == [0] * 4 + [1] * 5 + [2] * 5 + [3] * 7
    assert iterations(stages.is_weighted) == list(range(5, 22))
    assert iterations(stages.is_stage_end) == [9, 14, 21]


def test_updates_fall_into_the_window_of_each_stage_at_the_interval():
    assert iterations(bilevel_stages(CONFIG, 21).is_update) == [6, 8, 11, 13, 16, 18]
    whole = replace(CONFIG, dwm_stage_update_iters=None)
    assert iterations(bilevel_stages(whole, 21).is_update) == [6, 8, 11, 13, 16, 18, 20]


def test_defaults_make_the_warm_up_fit_the_weighters_start_and_the_interval_the_stage():
    assert bilevel_stages(WeightingConfig(), 600).warmup_iters == 0
    stages = bilevel_stages(WeightingConfig(dwm_init_from="lm"), 600)
    assert (stages.warmup_iters, stages.stage_iters, stages.update_interval) == (100, 100, 6)
    intervals = [bilevel_stages(WeightingConfig(), length).update_interval for length in (50, 1000, 7999, 8000, 10**6)]
    assert intervals == [1, 12, 99, 100, 100]


@pytest.mark.parametrize(
    ("changes", "train_iters", "named"),
    [
        ({}, 6, "--train-iters 6"),
        ({"dwm_update_interval": 5}, 21, "--dwm-update-interval 5"),
        ({"dwm_update_interval": 6, "dwm_stage_update_iters": None}, 21, "--dwm-update-interval 6"),
    ],
)
def test_a_schedule_in_which_nothing_is_learnt_is_refused(changes: dict, train_iters: int, named: str):
    with pytest.raises(UserError, match=named):
        bilevel_stages(replace(CONFIG, **changes), train_iters)


def test_a_weighter_that_has_begun_is_not_warmed_up_again():
    """A run that is made longer has a longer warm-up by default, of which none is left where a weighter has begun."""
    config = WeightingConfig(dwm_init_from="lm", dwm_num_stages=2, dwm_update_interval=2)
    assert bilevel_stages(config, 24, weighter_resumed_at=12) == bilevel_stages(config, 24)
    longer = bilevel_stages(config, 120, weighter_resumed_at=12)
    assert (longer.warmup_iters, longer.stage_iters) == (12, 54)
    assert bilevel_stages(replace(config, dwm_warmup_iters=40), 120, weighter_resumed_at=12).warmup_iters == 40


@pytest.mark.parametrize("mode", ["frozen", "rule"])
def test_a_warm_up_that_leaves_nothing_to_weigh_is_refused(mode: Literal["frozen", "rule"]):
    given: dict[str, Any] = {"frozen": {"dwm_load": "somewhere"}, "rule": {"dwm_rule": "random"}}[mode]
    config = WeightingConfig(dwm_mode=mode, dwm_warmup_iters=21, **given)
    with pytest.raises(
        UserError, match=f"--dwm-warmup-iters 21 leaves no iteration of --train-iters 21 for --dwm-mode {mode}"
    ):
        frozen_stages(config, 21)
    assert iterations(frozen_stages(config, 22).is_weighted, 22) == [22]


def test_a_frozen_weighter_weighs_from_the_start_and_never_learns():
    config = WeightingConfig(dwm_mode="frozen", dwm_load="somewhere")
    stages = frozen_stages(config, 21)
    assert iterations(stages.is_weighted) == list(range(1, 22)) and iterations(stages.is_update) == []
