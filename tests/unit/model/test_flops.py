"""Operation counts are Megatron-LM's (``num_floating_point_operations`` of core_v0.16.1), recorded for some shapes."""

from __future__ import annotations

import pytest

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.run import RunConfig, parse_run
from megatron_dwm.model.flops import outer_update_flops, scoring_flops, training_flops

RECORDED = [
    (
        "GPT-2 style",
        ModelConfig(12, 768, 12, seq_length=1024, max_position_embeddings=1024),
        50304,
        512,
        418398534107136,
    ),
    (
        "Llama style, untied",
        ModelConfig(
            24,
            1024,
            16,
            2752,
            seq_length=1024,
            max_position_embeddings=1024,
            swiglu=True,
            untie_embeddings_and_output_weights=True,
        ),
        32000,
        512,
        1137169901027328,
    ),
    (
        "group queries",
        ModelConfig(32, 4096, 32, 14336, 128, True, 8, 8192, 8192, swiglu=True),
        128256,
        1024,
        431765022088101888,
    ),
    ("heads wider than the model", ModelConfig(4, 256, 8, 1024, 64, True, 2, 2048, 2048), 1024, 8, 773094113280),
]


@pytest.mark.parametrize(("model", "vocab", "batch", "expected"), [case[1:] for case in RECORDED], ids=lambda value: "")
def test_a_training_step_counts_as_in_megatron_lm(model: ModelConfig, vocab: int, batch: int, expected: int):
    assert training_flops(model, vocab, batch) == pytest.approx(expected, rel=1e-12)


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
