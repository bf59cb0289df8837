"""Evaluation of the language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dwm.data.datasets import BatchReader
from megatron_dwm.model.engine import PipelineSchedule
from megatron_dwm.runtime.process_groups import Layout
from megatron_dwm.runtime.record_writers import say


@dataclass(frozen=True)
class Evaluation:
    """Result of one evaluation."""

    loss: float
    """Mean loss of the unmasked tokens; on the last pipeline stage."""
    samples: int
    """Samples read, over all replicas."""


def evaluate(
    schedule: PipelineSchedule,
    reader: BatchReader,
    batches: int,
    micro_batch_size: int,
    layout: Layout,
    *,
    tells: bool = False,
) -> Evaluation:
    """Mean loss over the next ``batches`` batches of ``reader``, without dropout.

    Args:
        tells: whether to print how far it is.
    """
    tells = tells and layout.is_first
    if tells:
        say(f"Evaluating on {batches * reader.share.all_samples} samples")
    sums = torch.zeros(2, device=torch.cuda.current_device())
    for chunk in schedule.chunks:
        chunk.eval()
    with torch.no_grad():
        for number in range(batches):
            if tells:
                say(f"Evaluating iter {number + 1}/{batches}")
            losses = schedule.run(reader.next(), micro_batch_size, forward_only=True)
            if losses is not None:
                sums += torch.stack([losses.total.sum(), losses.tokens.sum()])
    for chunk in schedule.chunks:
        chunk.train()
    dist.all_reduce(sums, group=layout.dp_group)
    loss = float(sums[0] / sums[1]) if layout.is_last_stage else float("nan")
    return Evaluation(loss, batches * reader.share.all_samples)
