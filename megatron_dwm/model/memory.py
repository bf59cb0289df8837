"""Memory that training will take, by Megatron-LM's estimate; it opens Megatron-LM's memory report."""

from __future__ import annotations

import math

from megatron_dwm.config.run import RunConfig

MEBIBYTE = 1024 * 1024
BILLION = 1e9


def memory_estimate(config: RunConfig, padded_vocab_size: int) -> list[str]:
    """Megatron-LM's lines on parameters and memory of the fullest rank."""
    weights, lines = _weights_and_optimizer(config, padded_vocab_size)
    selective = config.model.recompute_activations or config.model.recompute_granularity == "selective"
    activations, details = _activations(
        config, padded_vocab_size, sharded=config.parallel.sequence_parallel and selective
    )
    total = (
        f"Theoretical memory footprints: weight and optimizer={weights / MEBIBYTE:.2f} MB, "
        f"activation={activations / MEBIBYTE:.2f} MB, total={(weights + activations) / MEBIBYTE:.2f} MB\n"
    )
    return [*lines, *details, total]


def _weights_and_optimizer(config: RunConfig, vocab: int) -> tuple[float, list[str]]:
    """Bytes of weights, gradients and Adam's state in mixed precision."""
    model, tp, pp = config.model, config.parallel.tp, config.parallel.pp
    hidden = model.hidden
    norm = hidden * (1 if model.normalization == "RMSNorm" else 2)
    attention = 2 * hidden * model.head_size * (model.heads + model.query_groups)
    mlp = hidden * model.ffn * (3 if model.swiglu else 2)
    block = model.layers * (mlp + 2 * norm + attention) + norm
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
    sharded = config.parallel.use_distributed_optimizer
    return fullest * (6 + 12 / (config.data_parallel_size if sharded else 1)), lines


def _activations(config: RunConfig, vocab: int, *, sharded: bool) -> tuple[float, list[str]]:
    """Bytes of the first pipeline stage's activations.

    Args:
        sharded: whether sequence parallelism shards them, with core attention recomputed.
    """
    model, tp, pp = config.model, config.parallel.tp, config.parallel.pp
    tokens = model.sequence * config.training.micro_batch
    width = tokens * model.hidden
    if sharded:
        layer = width * (18 + 4 * model.ffn / model.hidden)
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
    total = layer * model.layers + (8 * tokens + width) * pp  # the embedding's input and dropout
    factor, in_flight = _in_flight(config)
    total *= factor
    lines += in_flight
    if pp == 1:  # logits and what the output layer takes in
        total += 4 * (width + tokens * vocab) if sharded else 2 * (tokens * vocab / tp + width)
    return total / tp if sharded else total * 1.05, lines


def _in_flight(config: RunConfig) -> tuple[float, list[str]]:
    """How the schedule's microbatches in flight change the memory of a full pipeline."""
    pp, stages = config.parallel.pp, config.parallel.virtual_stages(config.model.layers)
    if stages is not None:
        penalty = 1 + (pp - 1) / (pp * stages)
        return penalty, [
            f"Memory penalty from interleaved schedule: {penalty:.2f}",
            f"Number of in-flight microbatches: {math.ceil(penalty * pp)}",
        ]
    if pp == 1:
        return 1.0, []
    return min(1.0, config.num_microbatches / pp), [
        f"Number of in-flight microbatches: {min(config.num_microbatches, pp)}"
    ]
