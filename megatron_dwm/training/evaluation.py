"""Evaluation of the language model."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from megatron_dwm.data.loader import BatchLoader
from megatron_dwm.model.engine import PipelineEngine
from megatron_dwm.model.loss import mean_over_tokens
from megatron_dwm.runtime.device import current_device
from megatron_dwm.runtime.process_groups import ParallelState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Result of one evaluation."""

    loss: float
    """Mean loss of the unmasked tokens; on the last pipeline stage."""
    samples: int
    """Samples read, over all replicas."""


def evaluate(
    engine: PipelineEngine,
    batch_loader: BatchLoader,
    batches: int,
    micro_batch_size: int,
    parallel_state: ParallelState,
    *,
    log_progress: bool = False,
) -> Evaluation:
    """Return the mean loss over the next ``batches`` batches of ``reader``, without dropout.

    Args:
        log_progress: whether to log each batch.
    """
    if log_progress:
        logger.info(f"Evaluating on {batches * batch_loader.partition.global_samples} samples")
    sums = torch.zeros(2, device=current_device())
    for chunk in engine.chunks:
        chunk.eval()
    with torch.no_grad():
        for number in range(batches):
            if log_progress:
                logger.info(f"Evaluating iter {number + 1}/{batches}")
            losses = engine.run(batch_loader.next_batch(), micro_batch_size, forward_only=True)
            if losses is not None:
                sums += losses.sums
    for chunk in engine.chunks:
        chunk.train()
    loss = mean_over_tokens(sums, parallel_state) if parallel_state.is_last_pipeline_stage else float("nan")
    return Evaluation(loss, batches * batch_loader.partition.global_samples)
