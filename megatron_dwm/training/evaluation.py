"""Evaluation of the language model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_dwm.data.loader import BatchLoader
from megatron_dwm.model.engine import PipelineEngine
from megatron_dwm.model.loss import sum_over_replicas
from megatron_dwm.runtime.device import current_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationData:
    """The data that an evaluation reads."""

    loader: BatchLoader
    """The loader of all sets, one after the other."""
    batches: Mapping[str, int]
    """Batches of each set by its name, in order; a set that is all of the split has none."""

    @property
    def samples(self) -> int:
        """Samples that an evaluation reads, over all replicas."""
        return sum(self.batches.values()) * self.loader.partition.global_samples


@dataclass(frozen=True)
class Evaluation:
    """Result of one evaluation."""

    sums: torch.Tensor
    """Sum of the losses and number of unmasked tokens [2], over all replicas; on the last pipeline stage."""

    @property
    def loss(self) -> float:
        """Mean loss of the unmasked tokens; NaN if they were not counted."""
        return float(self.sums[0] / self.sums[1])

    @classmethod
    def of_all(cls, parts: Sequence[Evaluation]) -> Evaluation:
        """Return the combined result of several evaluations."""
        return cls(torch.stack([part.sums for part in parts]).sum(dim=0))


def evaluate(
    engine: PipelineEngine,
    batch_loader: BatchLoader,
    batches: int,
    micro_batch_size: int,
    *,
    log_progress: bool = False,
    dtype: torch.dtype = torch.float32,
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Return the mean loss over the next ``batches`` batches of ``batch_loader``, without dropout.

    Args:
        log_progress: whether to log each batch.
        dtype: type of the sums; Megatron-LM's are float32, which counts 2^24 tokens exactly.
        before_batch: called on every rank; may raise to interrupt the evaluation.
    """
    if log_progress:
        logger.info(f"Evaluating on {batches * batch_loader.partition.global_samples} samples")
    sums = torch.zeros(2, dtype=dtype, device=current_device())
    with engine.evaluating():
        for number in range(batches):
            before_batch()
            if log_progress:
                logger.info(f"Evaluating iter {number + 1}/{batches}")
            losses = engine.run(batch_loader.next_batch(), micro_batch_size, forward_only=True)
            if losses is not None:
                sums += losses.sums
    if engine.parallel_state.is_last_pipeline_stage:
        sum_over_replicas(sums, engine.parallel_state)
    return Evaluation(sums)
