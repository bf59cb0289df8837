"""Operations of weighting, by their parts."""

from __future__ import annotations

import pytest

from megatron_dwm.config.run import RunConfig, parse_run
from megatron_dwm.model.flops import training_flops
from megatron_dwm.weighting.flops import outer_update_flops, scoring_flops


def weighted_run(*flags: str) -> RunConfig:
    sizes = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32"
    rest = "--micro-batch-size 2 --global-batch-size 8 --train-iters 9 --lr 0.1 --mock-data"
    tokenizer = "--tokenizer-type NullTokenizer --vocab-size 127"
    weighting = "--dwm-weighter-steps 3 --dwm-target-batch-size 4"
    return parse_run([*sizes.split(), *rest.split(), *tokenizer.split(), *weighting.split(), *flags], world_size=1)


def test_an_outer_update_counts_its_passes():
    config, parameters = weighted_run(), 1000
    step, target = (training_flops(config.model, 128, samples) for samples in (8, 4))
    scores = scoring_flops(parameters, 8, 32)
    assert scores == 2 * parameters * 8 * 32
    # v, the aligned samples, two objectives, three steps.
    assert outer_update_flops(config, 128, parameters) == pytest.approx(target + step + 2 * scores + 3 * 3 * scores)
    cheaper = weighted_run("--dwm-alignment", "finite-difference")
    assert outer_update_flops(config, 128, 0) - outer_update_flops(cheaper, 128, 0) == pytest.approx(step / 3)
