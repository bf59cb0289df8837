"""One training step of the language model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_dwm.data.batch import Batch
from megatron_dwm.model.engine import PipelineEngine
from megatron_dwm.model.loss import SampleLosses, mean_over_tokens, weighted_loss
from megatron_dwm.model.protocols import Optimizer
from megatron_dwm.runtime.device import current_device
from megatron_dwm.runtime.process_groups import ParallelState


@dataclass(frozen=True)
class StepResult:
    """Result of one training step."""

    loss: float | None
    """Mean loss of the global batch's unmasked tokens, unweighted; on the last pipeline stage."""
    grad_norm: float | None
    num_zeros: float | None
    skipped: bool
    """Whether the gradient overflowed (fp16), so that no update was made."""
    learning_rate: float
    """Learning rate of this step, the largest of the parameter groups; the same on every rank."""
    sample_losses: SampleLosses | None
    """Losses of this replica's samples, on the last pipeline stage."""


def train_step(
    engine: PipelineEngine,
    optimizer: Optimizer,
    scheduler: Any,
    batch: Batch,
    micro_batch_size: int,
    sample_weights: torch.Tensor | None,
    optimizer_timer: AbstractContextManager[None] | None = None,
    empty_unused_memory_level: int = 0,
    passes: Iterable[None] = (None,),
    check_losses: Callable[[SampleLosses | None], None] | None = None,
) -> StepResult:
    """Run forward and backward passes over ``batch``, one optimizer step and one step of the learning-rate schedule.

    Args:
        sample_weights: weights of this replica's samples [n]; None for plain training.
        optimizer_timer: runs while the optimizer steps.
        empty_unused_memory_level: whether the GPU's unused memory is released: before the optimizer's step (1), and
            after it (2).
        passes: yields once for each time that the passes must be run.
        check_losses: called with the losses of each pass, in place of the engine's check.
    """
    parallel_state = engine.parallel_state
    losses: SampleLosses | None = None
    for _ in passes:
        for chunk in engine.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses = engine.run(
            batch,
            micro_batch_size,
            loss_function=weighted_loss(sample_weights),
            check_for_nan=engine.check_for_nan and check_losses is None,
        )
        if engine.check_for_nan and check_losses is not None:
            check_losses(losses)
    if empty_unused_memory_level >= 1:
        torch.cuda.empty_cache()
    learning_rate = max(group["lr"] for group in optimizer.param_groups)
    with optimizer_timer or nullcontext():
        updated, grad_norm, num_zeros = optimizer.step()
    if empty_unused_memory_level >= 2:
        torch.cuda.empty_cache()
    # A stage without the embeddings may lack a parameter group, so the learning rate is reduced over the stages too.
    least_updated, least_negative_rate = _min_over_model([float(updated), -learning_rate], parallel_state)
    updated = bool(least_updated)
    if updated:
        scheduler.step(increment=len(batch) * parallel_state.dp_size)
    return StepResult(
        loss=mean_over_tokens(losses.sums, parallel_state) if losses is not None else None,
        grad_norm=float(grad_norm) if grad_norm is not None else None,
        num_zeros=num_zeros,
        skipped=not updated,
        learning_rate=-least_negative_rate,
        sample_losses=losses,
    )


def _min_over_model(values: list[float], parallel_state: ParallelState) -> list[float]:
    """Return each value's minimum over the model-parallel ranks."""
    tensor = torch.tensor(values, device=current_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=parallel_state.mp_group)
    return list(tensor.tolist())
