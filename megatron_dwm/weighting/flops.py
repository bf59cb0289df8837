"""Floating-point operations of weighting, beyond those of plain training."""

from __future__ import annotations

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.run_sizes import RunSizes
from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.model.flops import FORWARD_AND_BACKWARD, MULTIPLY_AND_ADD, training_flops


def forward_flops(model: ModelConfig, padded_vocab_size: int, samples: int) -> float:
    """Return the operations of one forward pass of the language model over ``samples``."""
    return training_flops(model, padded_vocab_size, samples) / FORWARD_AND_BACKWARD


def scoring_flops(weighter_parameters: int, samples: int, seq_length: int) -> float:
    """Return the operations of scoring: one multiplication and addition for each parameter and token.

    Args:
        weighter_parameters: without the embedding, which is looked up.
        samples: the number of samples that are scored.
        seq_length: tokens of a sample.
    """
    return float(MULTIPLY_AND_ADD * weighter_parameters * samples * seq_length)


def outer_update_flops(
    model: ModelConfig,
    settings: WeightingConfig,
    sizes: RunSizes,
    padded_vocab_size: int,
    weighter_parameters: int,
    *,
    is_linear: bool = False,
) -> float:
    """Return the operations of one outer update: passes of the language model, and the weighter's steps.

    Args:
        model: the flags of the language model.
        settings: the flags of the weighting.
        sizes: the sizes of the run's batches.
        padded_vocab_size: padded vocabulary size of the language model.
        weighter_parameters: without the embedding, which is looked up.
        is_linear: whether the weighter's steps are conjugate-gradient steps on the whole replay, assumed to be full.
    """
    target = training_flops(model, padded_vocab_size, sizes.target_batch_size)
    batch = training_flops(model, padded_vocab_size, sizes.global_batch_size)
    alignment = batch * 2 / FORWARD_AND_BACKWARD if settings.dwm_alignment == "finite-difference" else batch
    scores = scoring_flops(weighter_parameters, sizes.global_batch_size, model.seq_length)
    # The objective before and after, and for each step a forward and backward pass.
    steps = settings.dwm_weighter_steps * FORWARD_AND_BACKWARD
    if is_linear:  # each step, and the first residual, is a product with the rows and one with their transpose
        steps = (settings.dwm_weighter_steps + 2) * 2 * settings.dwm_replay
    weighter = scores * (2 + steps)
    return target + alignment + weighter
