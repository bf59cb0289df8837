"""Floating-point operations of training, by Megatron-LM's count."""

from __future__ import annotations

from megatron_dwm.config.model import ModelConfig

FORWARD_AND_BACKWARD = 3  # a backward pass costs two forward passes
MULTIPLY_AND_ADD = 2


def training_flops(model: ModelConfig, padded_vocab_size: int, batch_size: int) -> float:
    """Return the operations of one forward and backward pass over ``batch_size`` samples.

    Matrix products only, a causal half of the attention matrix, and the logits: the terms of Megatron-LM's
    ``num_floating_point_operations`` that a dense GPT has.
    """
    hidden, seq = model.hidden_size, model.seq_length
    queries = model.head_size * model.num_attention_heads
    keys_and_values = 2 * model.head_size * model.query_groups
    gate = queries if model.attention_output_gate else 0
    attention = hidden * (queries + keys_and_values + gate) + queries * seq + queries * hidden
    mlp = hidden * model.ffn * (3 if model.has_gated_ffn else 2)
    per_token = model.num_layers * (attention + mlp) + hidden * padded_vocab_size
    return float(FORWARD_AND_BACKWARD * MULTIPLY_AND_ADD * batch_size * seq * per_token)
