"""Floating-point operations of training, by Megatron-LM's count, and of weighting."""

from __future__ import annotations

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.run import RunConfig

FORWARD_AND_BACKWARD = 3  # a backward pass costs two forward passes
MULTIPLY_AND_ADD = 2


def training_flops(model: ModelConfig, padded_vocab_size: int, batch_size: int) -> float:
    """Operations of one forward and backward pass over ``batch_size`` samples.

    Matrix products only, a causal half of the attention matrix, and the logits: the terms of Megatron-LM's
    ``num_floating_point_operations`` that a dense GPT has.
    """
    hidden, seq = model.hidden, model.sequence
    queries = model.head_size * model.heads
    keys_and_values = 2 * model.head_size * model.query_groups
    attention = hidden * (queries + keys_and_values) + queries * seq + queries * hidden
    mlp = hidden * model.ffn * (3 if model.swiglu else 2)
    per_token = model.layers * (attention + mlp) + hidden * padded_vocab_size
    return float(FORWARD_AND_BACKWARD * MULTIPLY_AND_ADD * batch_size * seq * per_token)


def scoring_flops(weighter_parameters: int, samples: int, seq_length: int) -> float:
    """Operations of scoring ``samples``: one multiplication and addition for each parameter and token.

    Args:
        weighter_parameters: without the embedding, which is looked up.
    """
    return float(MULTIPLY_AND_ADD * weighter_parameters * samples * seq_length)


def outer_update_flops(config: RunConfig, padded_vocab_size: int, weighter_parameters: int) -> float:
    """Operations of one outer update: passes of the language model, and the weighter's steps."""
    settings = config.weighting
    target = training_flops(config.model, padded_vocab_size, config.target_batch_size)
    batch = training_flops(config.model, padded_vocab_size, config.global_batch_size)
    alignment = batch if settings.dwm_alignment == "exact" else batch * 2 / FORWARD_AND_BACKWARD
    scores = scoring_flops(weighter_parameters, config.global_batch_size, config.model.sequence)
    # The objective before and after, and for each step a forward and backward pass.
    weighter = scores * (2 + settings.dwm_weighter_steps * FORWARD_AND_BACKWARD)
    return target + alignment + weighter
