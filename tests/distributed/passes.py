"""Passes of a language model through megatron-core's own schedule, one sample a microbatch: logits, and any mask.

Shape legend: N samples, s sequence length, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func

from tests.distributed.built_model import BuiltModel


def _run(chunks: list[Any], tokens: torch.Tensor, mask: torch.Tensor | None, with_labels: bool, **schedule: Any) -> Any:
    sequence = tokens.shape[1] - 1
    positions = torch.arange(sequence)[None]

    def forward_step(microbatches: Iterator[torch.Tensor], chunk: Any) -> tuple[torch.Tensor, Any]:
        sample = next(microbatches)[None]
        labels = sample[:, 1:] if with_labels else None
        return chunk(sample[:, :-1], positions, mask, labels=labels), report

    def report(output: torch.Tensor, non_loss_data: bool = False) -> Any:
        if non_loss_data:
            return output.detach().clone()
        return output.mean(), {"losses": output.detach().clone()}

    iterators = [iter(tokens) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(tokens),
        seq_length=sequence,
        micro_batch_size=1,
        **schedule,
    )


def logits(chunks: list[Any], tokens: torch.Tensor) -> torch.Tensor | None:
    """Return the logits [N, s, V] of ``tokens`` [N, s + 1] on the last pipeline stage, None on the others."""
    outputs = _run(chunks, tokens, None, with_labels=False, forward_only=True, collect_non_loss_data=True)
    if not mpu.is_pipeline_last_stage():
        return None
    local = torch.cat(outputs).contiguous()
    parts = [torch.empty_like(local) for _ in range(mpu.get_tensor_model_parallel_world_size())]
    dist.all_gather(parts, local, group=mpu.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1)


def losses_and_gradients(
    built: BuiltModel, tokens: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """Return the token losses [N, s] on the last pipeline stage, and the whole gradients by checkpoint key.

    Args:
        built: the model.
        tokens: [N, s + 1].
        mask: of attention, True where a token does not attend; causal without one.
    """
    for chunk in built.chunks:
        chunk.zero_grad_buffer()
    reports = _run(built.chunks, tokens, mask, with_labels=True, forward_only=False)
    params = (param for chunk in built.chunks for param in chunk.parameters())
    gradients = built.gathered({param: param.main_grad for param in params})
    if not mpu.is_pipeline_last_stage():
        return None, gradients
    return torch.cat([report["losses"] for report in reports]), gradients
