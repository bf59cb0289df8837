"""Operations of weighting, by their parts."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_dwm.config.run import RunConfig
from megatron_dwm.model.flops import training_flops
from megatron_dwm.weighting.flops import outer_update_flops, scoring_flops
from tests.small_runs import GPT, IN_PROCESS, NUM_SAMPLES, SEQ_LENGTH, parse_flags


def weighted_run(**changes: Any) -> RunConfig:
    weighting = {"--dwm-weighter-steps": 3, "--dwm-target-batch-size": 4}
    return parse_flags({**GPT, **IN_PROCESS, **weighting, **changes})


def update_flops(config: RunConfig, parameters: int) -> float:
    return outer_update_flops(config.model, config.weighting, config.sizes, 128, parameters)


def test_an_outer_update_counts_its_passes():
    config, parameters = weighted_run(), 1000
    step, target = (training_flops(config.model, 128, samples) for samples in (NUM_SAMPLES, 4))
    scores = scoring_flops(parameters, NUM_SAMPLES, SEQ_LENGTH)
    assert scores == 2 * parameters * NUM_SAMPLES * SEQ_LENGTH
    # v, the aligned samples, two objectives, three steps.
    assert update_flops(config, parameters) == pytest.approx(target + step + 2 * scores + 3 * 3 * scores)
    cheaper = weighted_run(**{"--dwm-alignment": "finite-difference"})
    assert update_flops(config, 0) - update_flops(cheaper, 0) == pytest.approx(step / 3)
