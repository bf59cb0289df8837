"""The language model's hidden states of samples, averaged over their tokens.

Shape legend: n samples of this replica, b samples of a microbatch, h hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_dwm.data.batch import Batch
from megatron_dwm.model.engine import PipelineEngine
from megatron_dwm.runtime.device import current_device


def mean_hidden_states(engine: PipelineEngine, batch: Batch, micro_batch_size: int) -> torch.Tensor:
    """Return the output of the final layer norm, averaged over each sample's tokens [n, h], float32.

    A forward pass at the current parameters, without dropout; a collective call of the replica's ranks, and the same on
    all of them.
    """
    state, config = engine.parallel_state, engine.config
    sums: list[torch.Tensor] = []

    def add_sums(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        sums.append(output.detach().float().sum(dim=0))  # of this rank's tokens [b, h]

    handles = [
        module.register_forward_hook(add_sums)
        for chunk in engine.chunks
        for name, module in chunk.named_modules()
        if name.endswith("decoder.final_layernorm")  # on the last stage alone
    ]
    try:
        with torch.no_grad(), engine.full_parameters(), engine.deterministic():
            engine.run(batch, micro_batch_size, forward_only=True)
    finally:
        for handle in handles:
            handle.remove()
    if state.is_last_pipeline_stage:
        total = torch.cat(sums)
        if config.sequence_parallel:
            dist.all_reduce(total, group=state.tp_group)
        if state.cp_size > 1:
            dist.all_reduce(total, group=state.cp_group)
    else:
        total = torch.empty(len(batch), config.hidden_size, device=current_device())
    if state.pp_size > 1:
        dist.broadcast(total, dist.get_global_rank(state.pp_group, state.pp_size - 1), group=state.pp_group)
    return total / engine.seq_length
