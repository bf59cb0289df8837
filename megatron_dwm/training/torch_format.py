"""Checkpoints in Megatron-LM's older format, ``torch``: a file for each tensor- and pipeline-parallel rank.

``iter_0000100/mp_rank_00/model_optim_rng.pt`` (``mp_rank_00_000`` in a pipeline) holds the rank's state, under the
names of its modules, so that only a run with the same layout can load it. The distributed optimizer's state is in
``distrib_optim.pt`` next to it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_dwm.config.checkpoint import CheckpointConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.config.run_sizes import RunSizes
from megatron_dwm.errors import UserError
from megatron_dwm.model.optimizer_parts import optimizer_parts
from megatron_dwm.runtime.process_groups import ParallelState
from megatron_dwm.safe_unpickling import read_torch_file, short_reason
from megatron_dwm.training.checkpoint_contents import (
    VERSION,
    WEIGHTING_PREFIX,
    PerParameter,
    model_key,
    rng_state,
)
from megatron_dwm.training.checkpoint_folders import rank_file
from megatron_dwm.training.optimizer_loading import load_optimizer
from megatron_dwm.training.optimizer_shards import SHARDS, gathered_shards, load_shards
from megatron_dwm.training.resume_checks import WORD_EMBEDDINGS
from megatron_dwm.training.saved_checkpoint import (
    DamagedCheckpointError,
    SavedCheckpoint,
    refuse_special_files,
    reported_damage,
    require_checksums,
)
from megatron_dwm.training.train_state import TrainComponents

_FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Names of the norms in a layer; Transformer Engine has them in the linear layers that follow."""


@dataclass(frozen=True)
class TorchCheckpoint(SavedCheckpoint):
    """A checkpoint in the format ``torch``."""

    embedding: tuple[int, ...] | None = None
    """Global shape of the word embeddings."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shapes of the tensors that are known before a rank's file is read: the word embeddings'."""
        return {} if self.embedding is None else {WORD_EMBEDDINGS: self.embedding}


def open_torch_checkpoint(
    path: Path, flags: CheckpointConfig, parallel: ParallelConfig, sizes: RunSizes, rank: int
) -> TorchCheckpoint:
    """Open the first rank's file, after a part of all files has been verified; no communication.

    Args:
        path: the first rank's file.
        rank: this rank, which determines the part that it verifies.

    Raises:
        UserError: it is damaged, or was saved in another layout, or by a very old version of Megatron-LM.
    """
    folder = path.parents[1]
    with reported_damage(folder):
        refuse_special_files(folder)
        if flags.checkpoint_checksums:
            require_checksums(folder, rank, sizes.world_size)
        state = read_torch_file(path)
        if not (isinstance(state, dict) and isinstance(state.get("args"), Namespace)):
            raise DamagedCheckpointError(f"{path.name} holds no arguments of a run")
        if not isinstance(state.get(_first_model_key(state)), dict):
            raise DamagedCheckpointError(f"{path.name} holds no model")
    arguments = vars(state["args"])
    where = f"--load {folder.parent}: {folder.name}, in the format torch,"
    if state.get("checkpoint_version") != VERSION:
        raise UserError(f"{where} has version {state.get('checkpoint_version')} and not {VERSION}; give another")
    present = parallel.tp, parallel.pp, sizes.virtual_stages
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size")
    saved = tuple(arguments.get(name) for name in names)
    if saved != present:
        raise UserError(
            f"{where} has TP, PP and virtual stages {_words(saved)}, and this run {_words(present)}; load it in "
            "its own layout and save it as torch_dist, which any layout can load"
        )
    was_sharded = bool(arguments.get("use_distributed_optimizer"))
    has_optimizer = not (flags.finetune or flags.no_load_optim) and "optimizer" in state
    if has_optimizer and was_sharded != parallel.use_distributed_optimizer:
        raise UserError(
            f"{where} was saved {'with' if was_sharded else 'without'} --use-distributed-optimizer and this run is "
            f"{'without' if was_sharded else 'with'} it; load it as it was saved, or with --no-load-optim"
        )
    rows = state[_first_model_key(state)].get(WORD_EMBEDDINGS)
    embedding = None if rows is None else (rows.shape[0] * parallel.tp, *rows.shape[1:])
    common = {key: value for key, value in state.items() if not key.startswith(("model", WEIGHTING_PREFIX))}
    if "optimizer" in common:
        common["optimizer"] = {}  # each rank reads its own
    keys = {"rng_state/": None} if "rng_state" in state else {}
    return TorchCheckpoint(folder, common, SimpleNamespace(state_dict_metadata=keys), embedding)


def load_torch_state(
    saved: TorchCheckpoint, components: TrainComponents, parallel_state: ParallelState, *, with_optimizer: bool
) -> dict[str, Any]:
    """Load this rank's model, and its optimizer's state; no communication.

    Returns:
        the rest of the file's content.

    Raises:
        UserError: the file is damaged, or belongs to another model.
    """
    path = rank_file(saved.folder, parallel_state.tp_rank, parallel_state.pp_rank, parallel_state.pp_size)
    with reported_damage(saved.folder):
        state: dict[str, Any] = read_torch_file(path)
    for number, chunk in enumerate(components.chunks):
        module: Any = chunk.module
        tensors = _renamed(state[model_key(components, number)], module.state_dict())
        try:
            module.load_state_dict(tensors)
        except RuntimeError as error:
            reason = short_reason(RuntimeError(" ".join(str(error).split())))
            raise UserError(
                f"--load {saved.folder.parent}: {path.parent.name} belongs to another model: {reason}"
            ) from None
    if with_optimizer and getattr(saved.arguments, "use_distributed_optimizer", False):
        load_optimizer(components.optimizer, state["optimizer"])
        with reported_damage(saved.folder):
            load_shards(components.optimizer, path.with_name(SHARDS))
    elif with_optimizer:
        load_optimizer(components.optimizer, _with_step(state["optimizer"], components, saved.folder))
    return state


def write_torch_state(
    folder: Path,
    flags: CheckpointConfig,
    parallel: ParallelConfig,
    common: Mapping[str, Any],
    components: TrainComponents,
    parallel_state: ParallelState,
    per_parameter: PerParameter | None = None,
) -> None:
    """Write this rank's files; collective with the distributed optimizer, whose shards are gathered.

    Args:
        common: the state that is the same on every rank.
        per_parameter: the weighting's per-parameter tensors, by name.
    """
    shards = None
    if parallel.use_distributed_optimizer and not flags.no_save_optim:
        shards = gathered_shards(components.optimizer, use_gloo=parallel.enable_gloo_process_groups)
    if parallel_state.dp_rank != 0 or parallel_state.cp_rank != 0:
        return
    state = dict(common)
    for number, chunk in enumerate(components.chunks):
        module: Any = chunk.module
        state[model_key(components, number)] = module.state_dict_for_save_checkpoint()
    if not flags.no_save_optim:
        state["optimizer"] = components.optimizer.state_dict()
        state["opt_param_scheduler"] = components.scheduler.state_dict()
    if not flags.no_save_rng:
        state["rng_state"] = [rng_state()]
    path = rank_file(folder, parallel_state.tp_rank, parallel_state.pp_rank, parallel_state.pp_size)
    for name, tensors in (per_parameter or {}).items():
        state[f"{WEIGHTING_PREFIX}{name}"] = {str(number): tensor for number, tensor in enumerate(tensors.values())}
    path.parent.mkdir(exist_ok=True)
    torch.save(state, path)
    if shards is not None:
        torch.save(shards, path.with_name(SHARDS))


def _renamed(saved: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's state under the names that this run's layers have."""
    found = {key: value for key, value in saved.items() if not key.endswith("_extra_state")}
    for apart, fused in _FUSED.items():
        for key in [key for key in found if key not in present]:
            for old, new in ((apart, fused), (fused, apart)):
                if (name := key.replace(old, new)) in present and old in key:
                    found[name] = found.pop(key)
                    break
    return found | {key: value for key, value in present.items() if key.endswith("_extra_state")}


def _with_step(state: dict[str, Any], components: TrainComponents, folder: Path) -> dict[str, Any]:
    """Return the optimizer's state with its step where megatron-core expects it.

    Raises:
        UserError: it belongs to other parameters.
    """
    inner = dict(state["optimizer"] if isinstance(state.get("optimizer"), dict) else state)
    (part,) = optimizer_parts(components.optimizer)
    saved, present = (
        [len(group["params"]) for group in groups["param_groups"]] for groups in (inner, part.optimizer.state_dict())
    )
    if saved != present:
        raise UserError(f"--load {folder.parent}: the optimizer state belongs to other parameters; add --no-load-optim")
    states = inner["state"].values()
    step = next((float(entry["step"]) for entry in states if "step" in entry), None)
    if step is not None:
        inner["state"] = {key: {**entry} for key, entry in inner["state"].items()} | {"common_step": step}
    return {**state, "optimizer": inner} if "optimizer" in state else inner


def _first_model_key(state: Mapping[str, Any]) -> str:
    return "model" if "model" in state else "model0"


def _words(sizes: tuple[Any, ...]) -> str:
    return ", ".join("none" if size is None else str(size) for size in sizes)
