"""Megatron-LM's estimate of the memory that training takes, the first part of its memory report."""

from __future__ import annotations

import math

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.parallel import ParallelConfig

MEBIBYTE = 1024 * 1024
BILLION = 1e9


def memory_estimate(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    padded_vocab_size: int,
    data_parallel_size: int,
    micro_batch_size: int,
    num_microbatches: int,
) -> list[str]:
    """Return Megatron-LM's lines on parameters and memory of the rank with the highest memory use."""
    weights, lines = _weights_and_optimizer(model, parallel, data_parallel_size, padded_vocab_size)
    sharded = parallel.sequence_parallel and model.recomputation == "selective"
    layers, details = _layer_activations(model, parallel, micro_batch_size, sharded=sharded)
    factor, in_flight = _in_flight(parallel, model.num_layers, num_microbatches)
    activations = layers * factor
    details += in_flight
    if parallel.pp == 1:
        activations += _logits(model, parallel.tp, micro_batch_size, padded_vocab_size, sharded=sharded)
    activations = activations / parallel.tp if sharded else activations * 1.05
    total = (
        f"Theoretical memory footprints: weight and optimizer={weights / MEBIBYTE:.2f} MB, "
        f"activation={activations / MEBIBYTE:.2f} MB, total={(weights + activations) / MEBIBYTE:.2f} MB\n"
    )
    return [*lines, *details, total]


def _weights_and_optimizer(
    model: ModelConfig, parallel: ParallelConfig, data_parallel_size: int, vocab: int
) -> tuple[float, list[str]]:
    """Return the bytes of weights, gradients and Adam's state in mixed precision."""
    hidden, tp, pp = model.hidden_size, parallel.tp, parallel.pp
    norm = hidden * (1 if model.normalization == "RMSNorm" else 2)
    attention = 2 * hidden * model.head_size * (model.num_attention_heads + model.query_groups)
    if model.attention_output_gate:
        attention += hidden * model.head_size * model.num_attention_heads
    mlp = hidden * model.ffn * (3 if model.has_gated_ffn else 2)
    block = model.num_layers * (mlp + 2 * norm + attention) + norm
    embedding, untied = hidden * vocab, model.untie_embeddings_and_output_weights
    fullest = (block / pp + embedding * (2 if untied and pp == 1 else 1)) / tp
    embeddings = embedding * (2 if untied else 1)
    lines = [
        f"Number of parameters in transformer block in billions: {block / BILLION: .2f}",
        f"Number of parameters in embedding layers in billions: {embeddings / BILLION:.2f}",
        f"Total number of parameters in billions: {(block + embeddings) / BILLION:.2f}",
        f"Number of parameters in most loaded shard in billions: {fullest / BILLION:.4f}",
    ]
    if pp > 1:
        lines.append(f"Number of parameters in other shards in billions: {block / (pp * tp) / BILLION:.4f}")
    # 16-bit weights, fp32 gradients, master weights and two moments; the distributed optimizer shards the last three.
    sharded = parallel.use_distributed_optimizer
    return fullest * (6 + 12 / (data_parallel_size if sharded else 1)), lines


def _layer_activations(
    model: ModelConfig, parallel: ParallelConfig, micro_batch: int, *, sharded: bool
) -> tuple[float, list[str]]:
    """Return the bytes of one microbatch's activations in the first pipeline stage, without the output layer.

    Args:
        sharded: whether sequence parallelism shards them, with core attention recomputed.
    """
    tp, tokens = parallel.tp, model.seq_length * micro_batch
    width = tokens * model.hidden_size
    if sharded:
        layer = width * (18 + 4 * model.ffn / model.hidden_size)
        lines = [
            "compute_activation_memory with SP",
            f"Activation memory footprint per transformer layer: {layer / MEBIBYTE / tp:.1f} MB",
        ]
    else:
        layer = width * (10 + 24 / tp)
        lines = [
            "compute_activation_memory_without_sp",
            f"Activation memory footprint per transformer layer (precise, without SP): {layer / MEBIBYTE:.1f} MB",
        ]
    return layer * model.num_layers + (8 * tokens + width) * parallel.pp, lines  # the embedding's input and dropout


def _logits(model: ModelConfig, tp: int, micro_batch: int, vocab: int, *, sharded: bool) -> float:
    """Return the bytes of the logits and of the output layer's input."""
    tokens = model.seq_length * micro_batch
    width = tokens * model.hidden_size
    return 4 * (width + tokens * vocab) if sharded else 2 * (tokens * vocab / tp + width)


def _in_flight(parallel: ParallelConfig, num_layers: int, num_microbatches: int) -> tuple[float, list[str]]:
    """Return the factor by which the schedule's microbatches in flight change the memory of a full pipeline."""
    pp, stages = parallel.pp, parallel.virtual_stages(num_layers)
    if stages is not None:
        penalty = 1 + (pp - 1) / (pp * stages)
        return penalty, [
            f"Memory penalty from interleaved schedule: {penalty:.2f}",
            f"Number of in-flight microbatches: {math.ceil(penalty * pp)}",
        ]
    if pp == 1:
        return 1.0, []
    return min(1.0, num_microbatches / pp), [f"Number of in-flight microbatches: {min(num_microbatches, pp)}"]
