"""Gathering of the parameters of a model that is split over ranks.

A *full state* maps checkpoint keys to unsharded tensors, those of layers stacked: [layers, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.utils import unwrap_model

from megatron_dwm.model.protocols import ModelChunk
from megatron_dwm.runtime.device import current_device


def gather_full_state(
    chunks: Sequence[ModelChunk | torch.nn.Module], wanted: Callable[[str], bool], *, num_layers: int | None = None
) -> dict[str, torch.Tensor]:
    """Return unsharded float32 copies of parameters on the CPU of every rank, from any layout.

    Every rank must call it.

    Args:
        chunks: this rank's model chunks, wrapped or not.
        wanted: whether a parameter is wanted, by its checkpoint key.
        num_layers: the number of first layers to gather; by default all.

    Returns:
        checkpoint key to tensor; parameters of layers are stacked, [layers, ...].
    """
    shards = [shard for shard in _main_shards(chunks) if wanted(shard.key)]
    if num_layers is not None:
        shards = [s for s in shards if s.prepend_axis_num == 0 or s.global_offset[0] < num_layers]
    shapes = _agree_on_shapes({shard.key: shard.global_shape for shard in shards})
    state = {}
    for key, shape in shapes.items():
        if num_layers is not None and key.startswith("decoder.layers."):
            shape = (num_layers, *shape[1:])
        full = torch.zeros(shape, dtype=torch.float32, device=current_device())
        for shard in shards:
            if shard.key == key:
                full[shard.global_slice()] = shard.data.detach().float()
        # Every element is filled on exactly one rank and zero on the others.
        dist.all_reduce(full)
        state[key] = full.cpu()
    return state


def _main_shards(chunks: Sequence[ModelChunk | torch.nn.Module]) -> list[ShardedTensor]:
    """Return this rank's parts of the parameters, without replicas that another rank provides."""
    shards = []
    for chunk in unwrap_model(list(chunks)):
        sharded = chunk.sharded_state_dict()
        apply_factories(sharded)
        shards += [
            value
            for value in nested_values(sharded)
            if isinstance(value, ShardedTensor) and is_main_replica(value.replica_id)
        ]
    return shards


def _agree_on_shapes(local_shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return all ranks' keys and global shapes, in the same order on every rank."""
    gathered: list[dict[str, tuple[int, ...]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, local_shapes)
    return dict(sorted(item for shapes in gathered for item in shapes.items()))
