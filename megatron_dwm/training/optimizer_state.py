"""Loading of the optimizer's state from a checkpoint, whatever kind of optimizer saved it.

The kinds differ in where a checkpoint keeps the moments of a parameter, and its fp32 copy if the model is in half
precision. ``KEY`` is the parameter's key in the model:

- without the distributed optimizer: ``optimizer.state.exp_avg.KEY`` and so on; ``optimizer.state.fp32_param.KEY``, or
  in fp32 ``KEY`` itself;
- the distributed optimizer, ``--dist-ckpt-optim-fully-reshardable``: the same, and ``optimizer.state.param.KEY``;
- the distributed optimizer otherwise: flat buckets that hold many parameters each, of this TP and PP size.

State of the run's kind is loaded by megatron-core. State of another kind is read parameter by parameter and put
where the run's optimizer keeps it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from megatron_dwm.errors import UserError
from megatron_dwm.model.protocols import Optimizer
from megatron_dwm.training.checkpoint_contents import model_key
from megatron_dwm.training.optimizer import allocate_state
from megatron_dwm.training.optimizer_loading import (
    PARAM,
    inner_state,
    keeping_hyperparameters,
    load_optimizer,
    only_part,
    saved_step,
    set_states,
)
from megatron_dwm.training.saved_checkpoint import SavedCheckpoint
from megatron_dwm.training.train_state import TrainComponents

Load = Callable[[dict[str, Any]], dict[str, Any]]
STATE = "optimizer.state."
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
_BUCKET = re.compile(
    r"optimizer\.distributed\.dp_group_idx_(?P<group>\d+)\.gbuf_idx_(?P<buffer>\d+)\.dtype_.*"
    r"\.bucket_idx_(?P<bucket>\d+)\.(?P<name>\w+)"
)
START_ALIGNMENT = 64
"""megatron-core starts each parameter at a multiple of this in a bucket of the distributed optimizer."""


class NativeState:
    """State of the run's kind of optimizer."""

    def __init__(self, optimizer: Optimizer, metadata: Mapping[str, Any]) -> None:
        self.optimizer, self.metadata = optimizer, dict(metadata)

    def template(self, sharded_model: dict[str, Any]) -> dict[str, Any]:
        """Return the template that is loaded together with the model."""
        allocate_state(self.optimizer)
        with keeping_hyperparameters(only_part(self.optimizer)):
            state = self.optimizer.sharded_state_dict(sharded_model, is_loading=True, metadata=self.metadata)
        # Groups are matched here, because megatron-core would match those of the checkpoint and the run by index.
        inner_state(state).pop("param_groups", None)
        return {"optimizer": state}

    def apply(self, loaded: Mapping[str, Any]) -> None:
        """Put the loaded state into the optimizer."""
        load_optimizer(self.optimizer, loaded["optimizer"])


class ModelSpaceState:
    """State of another kind of optimizer that has a tensor for each parameter."""

    def __init__(self, components: TrainComponents, saved: SavedCheckpoint, load: Load) -> None:
        self.components, self.saved, self.load = components, saved, load
        self._templates: dict[torch.nn.Parameter, dict[str, Any]] = {}

    def template(self, sharded_model: dict[str, Any]) -> dict[str, Any]:
        """Return nothing: the state is loaded after the model, because it may include the model's tensors."""
        main = next((f"{STATE}{name}" for name in ("fp32_param", PARAM) if _has_state(self.saved, name)), None)
        prefixes = {PARAM: main, **{name: STATE + name for name in MOMENTS if _has_state(self.saved, name)}}
        for param, entry in _sharded_parameters(self.components, sharded_model):
            self._templates[param] = {name: _template_of(entry, param, prefix) for name, prefix in prefixes.items()}
        return {}

    def apply(self, loaded: Mapping[str, Any]) -> None:
        """Load the tensors and copy them to where the run's optimizer keeps them."""
        states = self.load({str(number): state for number, state in enumerate(self._templates.values())})
        by_parameter = {param: states[str(number)] for number, param in enumerate(self._templates)}
        common = self.saved.common["optimizer"]
        set_states(self.components.optimizer, by_parameter, saved_step(inner_state(common)), common.get("grad_scaler"))


class BucketState:
    """State of the distributed optimizer in flat buckets, for an optimizer with other buckets or none."""

    def __init__(self, components: TrainComponents, saved: SavedCheckpoint, model_parallel_rank: int) -> None:
        self.components, self.saved, self.model_parallel_rank = components, saved, model_parallel_rank

    def template(self, sharded_model: dict[str, Any]) -> dict[str, Any]:
        """Return nothing: buckets are read separately."""
        return {}

    def apply(self, loaded: Mapping[str, Any]) -> None:
        """Read the buckets and copy their tensors to where the run's optimizer keeps them.

        Raises:
            UserError: the buckets do not hold this rank's parameters.
        """
        places = {
            key: match
            for key in self.saved.shapes
            if (match := _BUCKET.fullmatch(key)) and int(match["group"]) == self.model_parallel_rank
        }
        buffers: dict[int, dict[int, dict[str, torch.Tensor]]] = {}
        for key, tensor in self.saved.read_tensors(places).items():
            match = places[key]
            buffers.setdefault(int(match["buffer"]), {}).setdefault(int(match["bucket"]), {})[match["name"]] = tensor
        if len(buffers) != len(self.components.chunks):
            raise UserError(
                f"{self.saved.folder}: the distributed optimizer's state has {len(buffers)} buffers for "
                f"{len(self.components.chunks)} parts of the model; load with --no-load-optim"
            )
        by_parameter: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
        for number, chunk in enumerate(self.components.chunks):
            params = [param for param in chunk.module.parameters() if param.requires_grad]
            buckets = [buffers[number][bucket] for bucket in sorted(buffers[number])]
            by_parameter.update(unpack_buckets(buckets, params, self.saved.folder))
        groups = self.saved.read_object(_bucket_object(self.model_parallel_rank, "optimizer"))
        scaler_key = _bucket_object(self.model_parallel_rank, "grad_scaler")
        has_scaler = scaler_key in self.saved.metadata.state_dict_metadata
        scaler = self.saved.read_object(scaler_key) if has_scaler else None
        set_states(self.components.optimizer, by_parameter, saved_step(groups), scaler)


def choose_reader(
    saved: SavedCheckpoint,
    components: TrainComponents,
    metadata: Mapping[str, Any],
    model_parallel_rank: int,
    load: Load,
) -> NativeState | ModelSpaceState | BucketState:
    """Return the reader that can load the checkpoint's optimizer state.

    Args:
        metadata: how the checkpoint's state is sharded.
        load: loads a template of sharded tensors; a collective call.
    """
    part = only_part(components.optimizer)
    is_distributed = isinstance(part, DistributedOptimizer)
    if any(_BUCKET.fullmatch(key) for key in saved.shapes):
        sizes = saved.read_object(_bucket_object(model_parallel_rank, "per_bucket_numel_unpadded"))
        if is_distributed and sizes == part.per_bucket_numel_unpadded:
            return NativeState(components.optimizer, metadata)
        return BucketState(components, saved, model_parallel_rank)
    was_distributed = (
        "distrib_optim_sharding_type" in metadata or "param_state_sharding_type" in saved.common["optimizer"]
    )
    was_half = _has_state(saved, "fp32_param")
    is_half = isinstance(part, Float16OptimizerWithFloat16Params)
    has_momentum = any(group.get("momentum") for group in part.param_groups)
    is_native = was_distributed == is_distributed and (is_distributed or was_half == is_half)
    if is_native and not (has_momentum and not _has_state(saved, "momentum_buffer")):
        return NativeState(components.optimizer, metadata)
    return ModelSpaceState(components, saved, load)


def _has_state(saved: SavedCheckpoint, name: str) -> bool:
    return any(key.startswith(f"{STATE}{name}.") for key in saved.shapes)


def _bucket_object(model_parallel_rank: int, name: str) -> str:
    return f"optimizer.distributed.dp_group_idx_{model_parallel_rank}.{name}/shard_0_1"


def _template_of(entry: Any, param: torch.Tensor, prefix: str | None) -> Any:
    """Return the template to load a parameter's state tensor into; without a prefix, its value in the model.

    Args:
        entry: megatron-core's description of the parameter's place in the checkpoint.
    """
    value = torch.empty(param.shape, dtype=torch.float32, device="cpu")
    if prefix is not None:
        return make_sharded_optimizer_tensor(entry, value, prefix)
    if isinstance(entry, ShardedTensorFactory):
        return replace(entry, data=value)
    return replace(entry, data=value, dtype=value.dtype)


def unpack_buckets(
    buckets: list[dict[str, torch.Tensor]], params: list[torch.nn.Parameter], folder: Path
) -> dict[torch.nn.Parameter, dict[str, torch.Tensor]]:
    """Return each parameter's tensors from the flat buckets of one model chunk.

    megatron-core fills buckets with the parameters from the last to the first, each from a multiple of
    :data:`START_ALIGNMENT`. A bucket ends with its last parameter, which shows where the next one begins.

    Args:
        buckets: flat tensors by name, in order.
        params: the chunk's, in the model's order.

    Raises:
        UserError: the parameters do not fill the buckets.
    """
    misfit = UserError(
        f"{folder}: the distributed optimizer's buckets are not filled by this model's parameters; load with "
        "--no-load-optim"
    )
    unpacked = {}
    remaining = iter(buckets)
    bucket: dict[str, torch.Tensor] = {}
    end = size = 0
    for param in reversed(params):
        if end == size:
            bucket, end = next(remaining, {}), 0
            if not bucket:
                raise misfit
            size = len(bucket[PARAM])
        start = -(-end // START_ALIGNMENT) * START_ALIGNMENT
        end = start + param.numel()
        if end > size:
            raise misfit
        unpacked[param] = {name: flat[start:end].view(param.shape) for name, flat in bucket.items()}
    if end != size or next(remaining, None) is not None:
        raise misfit
    return unpacked


def _sharded_parameters(
    components: TrainComponents, sharded_model: Mapping[str, Any]
) -> Iterator[tuple[torch.nn.Parameter, Any]]:
    """Yield the parameters with megatron-core's description of their place in the checkpoint."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    for number, chunk in enumerate(components.chunks):
        entries = nested_values(sharded_model[model_key(components, number)])
        by_storage = {id(entry.data): entry for entry in entries if isinstance(entry.data, torch.Tensor)}
        for param in chunk.module.parameters():
            if param.requires_grad:
                yield param, by_storage[id(param)]
