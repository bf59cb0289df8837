"""What a checkpoint holds, by Megatron-LM's keys: model, optimizer, schedule, random state and arguments."""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_dwm.config.checkpoint import CheckpointConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.runtime.process_groups import ParallelState
from megatron_dwm.training.train_state import TrainComponents, TrainState

PerParameter = Mapping[str, Mapping[torch.nn.Parameter, torch.Tensor]]
"""Tensors with the shapes of the model's parameters, by name."""
WEIGHTING_PREFIX = "dwm."
"""Prefix of the weighting's per-parameter tensors."""
EVALUATIONS_DUE = "dwm_evaluations_due"
"""Name of the argument with the evaluations that are due; only checkpoints of interrupted evaluations have it."""

VERSION = 3.0
"""Version of this layout of keys in Megatron-LM."""


def sharded_state(
    common: Mapping[str, Any],
    components: TrainComponents,
    parallel_state: ParallelState,
    metadata: dict[str, Any],
    *,
    is_loading: bool,
    with_optimizer: bool,
    with_rng: bool,
    per_parameter: PerParameter | None = None,
) -> dict[str, Any]:
    """Return the sharded state to save, or the template to load into.

    Args:
        common: the state that is the same on every rank; a template needs none.
        per_parameter: the weighting's per-parameter tensors, by name.
    """
    model = sharded_model(components, metadata)
    state = {**common, **model}
    if with_optimizer:
        state["optimizer"] = components.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
        state["opt_param_scheduler"] = components.scheduler.state_dict()
    if with_rng:
        state["rng_state"] = _sharded_rng_state(parallel_state)
    for name, tensors in (per_parameter or {}).items():
        state[f"{WEIGHTING_PREFIX}{name}"] = _sharded_as_parameters(model, tensors, f"{WEIGHTING_PREFIX}{name}")
    return state


def common_state(arguments: Mapping[str, Any], components: TrainComponents, train_state: TrainState) -> dict[str, Any]:
    """Return the state that is the same on every rank.

    Args:
        arguments: those of the run.
    """
    return {
        "args": Namespace(**arguments, **_counters(train_state), **components.vocabulary.arguments),
        "checkpoint_version": VERSION,
        "iteration": train_state.iteration,
        "num_floating_point_operations_so_far": train_state.num_floating_point_operations_so_far,
    }


def sharded_model(components: TrainComponents, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the sharded state of each model chunk."""
    return {
        model_key(components, number): chunk.module.sharded_state_dict(metadata=metadata)
        for number, chunk in enumerate(components.chunks)
    }


def trained_parameters(components: TrainComponents) -> list[torch.nn.Parameter]:
    """Return this rank's parameters that have gradients, in the model's order."""
    return [param for chunk in components.chunks for param in chunk.parameters() if param.requires_grad]


def _sharded_as_parameters(
    model: dict[str, Any], tensors: Mapping[torch.nn.Parameter, torch.Tensor], prefix: str
) -> dict[str, Any]:
    """Return tensors of the parameters' shapes, sharded as they are in ``model``, by the parameters' order."""
    from megatron.core.dist_checkpointing.optimizer import (
        get_param_id_to_sharded_param_map,
        make_sharded_optimizer_tensor,
    )

    sharded = get_param_id_to_sharded_param_map(model, list(tensors))
    return {
        str(number): make_sharded_optimizer_tensor(sharded[number], tensor, prefix)
        for number, tensor in enumerate(tensors.values())
    }


def model_key(components: TrainComponents, number: int) -> str:
    """Return the key of a model chunk's state."""
    return "model" if len(components.chunks) == 1 else f"model{number}"


def _counters(train_state: TrainState) -> dict[str, Any]:
    """Return how far a run has come, as arguments under Megatron-LM's names."""
    counts = {key: value for key, value in asdict(train_state).items() if key.startswith(("consumed", "skipped"))}
    due = {EVALUATIONS_DUE: list(train_state.evaluations_due)} if train_state.evaluations_due else {}
    return counts | due


def sharding_metadata(parallel: ParallelConfig, checkpoint: CheckpointConfig) -> dict[str, Any]:
    """Return the metadata that tells megatron-core how to shard the saved state."""
    metadata: dict[str, Any] = {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": data_parallel_group(),
    }
    if parallel.use_distributed_optimizer:
        if checkpoint.dist_ckpt_optim_fully_reshardable:
            metadata["distrib_optim_sharding_type"] = "fully_reshardable"
            metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
        else:
            metadata["distrib_optim_sharding_type"] = "dp_reshardable"
    return metadata


def data_parallel_group() -> Any:
    """Return the group over which megatron-core distributes the saving of replicated state."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def rng_state() -> dict[str, Any]:
    """Return the state of all random generators of this rank."""
    from megatron.core import tensor_parallel

    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _sharded_rng_state(parallel_state: ParallelState) -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return ShardedObject(
        "rng_state",
        [rng_state()],
        (parallel_state.pp_size, parallel_state.tp_size),
        (parallel_state.pp_rank, parallel_state.tp_rank),
        replica_id=dist.get_rank(parallel_state.dp_cp_group),
    )


def set_rng_state(state: dict[str, Any]) -> None:
    """Continue all random generators of this rank from ``state``."""
    from megatron.core import tensor_parallel

    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])


def comparable(common: dict[str, Any]) -> dict[str, Any]:
    """Return the common state without the optimizer's, whose parameter groups may be in another order on each rank."""
    kept = {key: value for key, value in common.items() if key != "optimizer"}
    return kept | {"args": vars(common["args"])}
