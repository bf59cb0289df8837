"""Checkpoints in megatron-core's ``torch_dist`` format, with Megatron-LM's folders, keys and arguments.

``<save>/iter_0000100/`` holds model, optimiser, schedule and random state; ``dwm_state.pt`` in it holds the weighter's
state; ``<save>/latest_checkpointed_iteration.txt`` names the newest. A checkpoint is written beside its place and put
there when it is whole, so an interrupted save loses nothing.
"""

from __future__ import annotations

import os
import random
import shutil
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_dwm.config.run import RunConfig
from megatron_dwm.errors import UserError
from megatron_dwm.runtime.distributed import Layout
from megatron_dwm.training.optimizer import allocate_state, load_optimizer

TRACKER = "latest_checkpointed_iteration.txt"
DWM_STATE = "dwm_state.pt"
VERSION = 3.0


@dataclass
class Progress:
    """How far a run has come."""

    iteration: int = 0
    consumed_train_samples: int = 0
    skipped_train_samples: int = 0
    consumed_valid_samples: int = 0
    num_floating_point_operations_so_far: float = 0


@dataclass(frozen=True)
class TrainingObjects:
    """What a checkpoint saves and restores."""

    chunks: Sequence[Any]
    """DDP model chunks."""
    optimizer: Any
    scheduler: Any


def iteration_folder(folder: Path, iteration: int) -> Path:
    return folder / f"iter_{iteration:07d}"


def save_checkpoint(
    config: RunConfig,
    objects: TrainingObjects,
    progress: Progress,
    layout: Layout,
    dwm_state: dict[str, Any] | None,
) -> Path:
    """Write a checkpoint; every rank calls it. Returns its folder."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

    root = Path(config.checkpoint.save or ".")
    final = iteration_folder(root, progress.iteration)
    beside = root / f".{final.name}.partial"
    if layout.is_first:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    dist.barrier()

    metadata = _sharding_metadata(config)
    state = _state_dict(config, objects, progress, layout, metadata, for_saving=True)
    strategy = get_default_save_sharded_strategy("torch_dist")
    if config.checkpoint.ckpt_fully_parallel_save:
        strategy = FullyParallelSaveStrategyWrapper(strategy, _data_parallel_group())
    stored = {key: value for key, value in metadata.items() if key != "dp_cp_group"}
    dist_checkpointing.save(
        state,
        str(beside),
        strategy,
        preprocess_common_before_consistancy_check=_comparable,
        content_metadata=stored,
    )
    dist.barrier()
    if layout.is_first:
        if dwm_state is not None:
            torch.save(dwm_state, beside / DWM_STATE)
        _sync_files(beside)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(beside, final)
        previous = _tracked_iteration(root)
        _write_tracker(root, progress.iteration)
        _drop_unretained(root, previous, progress.iteration, config.checkpoint.save_retain_interval)
    dist.barrier()
    return final


def find_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint folder that ``--load`` (and ``--ckpt-step``) name; None to start anew.

    Raises:
        UserError: a checkpoint is asked for by name, or must exist, and does not.
    """
    flags = config.checkpoint
    if flags.load is None:
        return None
    root = Path(flags.load)
    iteration = flags.ckpt_step if flags.ckpt_step is not None else _tracked_iteration(root)
    if iteration is None:
        if flags.exit_on_missing_checkpoint:
            raise UserError(
                f"--load {root}: no {TRACKER} there; check the path, or leave out --exit-on-missing-checkpoint"
            )
        return None
    folder = iteration_folder(root, iteration)
    if not (folder / "metadata.json").is_file():
        raise UserError(
            f"--load {root}: {folder.name} is not a whole torch_dist checkpoint; give --ckpt-step of another"
        )
    return folder


def load_checkpoint(
    config: RunConfig, folder: Path, objects: TrainingObjects, layout: Layout
) -> tuple[Progress, dict[str, Any] | None]:
    """Restore ``objects`` from ``folder``; every rank calls it.

    Returns:
        the progress the checkpoint was saved at (zero with ``--finetune``) and the weighter's state, if it has one.

    Raises:
        UserError: the checkpoint is of another model, or its optimiser cannot be loaded under this layout.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper

    flags = config.checkpoint
    common = dist_checkpointing.load_common_state_dict(str(folder))
    saved = common.get("args", Namespace())
    _check_same_model(config, saved, folder)
    same_layout = (
        getattr(saved, "tensor_model_parallel_size", 1),
        getattr(saved, "pipeline_model_parallel_size", 1),
    ) == (config.parallel.tp, config.parallel.pp)
    with_optimizer = not (flags.finetune or flags.no_load_optim or getattr(saved, "no_save_optim", False))
    with_rng = not (flags.finetune or flags.no_load_rng or getattr(saved, "no_save_rng", False)) and same_layout

    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {}
    sharding = metadata.get("distrib_optim_sharding_type")
    moves_optimizer = with_optimizer and config.parallel.use_distributed_optimizer and not same_layout
    if moves_optimizer and sharding != "fully_reshardable":
        raise UserError(
            f"--load {flags.load}: the distributed optimiser's state was saved as {sharding} and cannot move to "
            "another TP or PP size; save with --dist-ckpt-optim-fully-reshardable, or load with --no-load-optim"
        )
    metadata["dp_cp_group"] = _data_parallel_group()
    if with_optimizer:
        allocate_state(objects.optimizer)
    template = _state_dict(
        config, objects, Progress(), layout, metadata, with_optimizer=with_optimizer, with_rng=with_rng
    )
    strategy = get_default_load_sharded_strategy(str(folder))
    if flags.ckpt_fully_parallel_load:
        strategy = FullyParallelLoadStrategyWrapper(strategy, _data_parallel_group())
    state = dist_checkpointing.load(template, str(folder), strategy, strict="assume_ok_unexpected")

    for number, chunk in enumerate(objects.chunks):
        chunk.load_state_dict(state["model" if len(objects.chunks) == 1 else f"model{number}"])
    if with_optimizer:
        load_optimizer(objects.optimizer, state["optimizer"])
        objects.scheduler.load_state_dict(state["opt_param_scheduler"])
    elif config.optimizer.fp16 or config.optimizer.bf16:
        objects.optimizer.reload_model_params()
    if with_rng:
        _set_rng_state(state["rng_state"][0])
    dist.barrier()
    if flags.finetune:
        return Progress(), None
    progress = Progress(
        iteration=state["iteration"],
        consumed_train_samples=getattr(saved, "consumed_train_samples", 0),
        skipped_train_samples=getattr(saved, "skipped_train_samples", 0),
        consumed_valid_samples=getattr(saved, "consumed_valid_samples", 0),
        num_floating_point_operations_so_far=state.get("num_floating_point_operations_so_far", 0),
    )
    path = folder / DWM_STATE
    return progress, torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None


def _state_dict(
    config: RunConfig,
    objects: TrainingObjects,
    progress: Progress,
    layout: Layout,
    metadata: dict[str, Any],
    *,
    for_saving: bool = False,
    with_optimizer: bool = True,
    with_rng: bool = True,
) -> dict[str, Any]:
    """The sharded state to save, or the template to load into."""
    if for_saving:
        with_optimizer, with_rng = not config.checkpoint.no_save_optim, not config.checkpoint.no_save_rng
    state: dict[str, Any] = {
        "args": _megatron_args(config, progress),
        "checkpoint_version": VERSION,
        "iteration": progress.iteration,
        "num_floating_point_operations_so_far": progress.num_floating_point_operations_so_far,
    }
    for number, chunk in enumerate(objects.chunks):
        key = "model" if len(objects.chunks) == 1 else f"model{number}"
        state[key] = chunk.module.sharded_state_dict(metadata=metadata)
    if with_optimizer:
        state["optimizer"] = objects.optimizer.sharded_state_dict(state, is_loading=not for_saving, metadata=metadata)
        state["opt_param_scheduler"] = objects.scheduler.state_dict()
    if with_rng:
        state["rng_state"] = _sharded_rng_state(layout)
    return state


def _megatron_args(config: RunConfig, progress: Progress) -> Namespace:
    """The arguments as Megatron-LM keeps them: plain values under its own names."""
    model = config.model
    derived = {
        "world_size": config.world_size,
        "data_parallel_size": config.data_parallel_size,
        "global_batch_size": config.global_batch_size,
        "ffn_hidden_size": model.ffn,
        "kv_channels": model.head_size,
        "encoder_seq_length": model.sequence,
        "virtual_pipeline_model_parallel_size": config.parallel.virtual_stages(model.layers),
        "position_embedding_type": model.positions,
        "train_iters": config.train_iters,
    }
    counts = {key: value for key, value in asdict(progress).items() if key.startswith(("consumed", "skipped"))}
    return Namespace(**{**config.flat(), **derived, **counts})


def _check_same_model(config: RunConfig, saved: Namespace, folder: Path) -> None:
    expected = {
        "num_layers": config.model.layers,
        "hidden_size": config.model.hidden,
        "num_attention_heads": config.model.heads,
    }
    for name, value in expected.items():
        found = getattr(saved, name, value)
        if found != value:
            raise UserError(
                f"--{name.replace('_', '-')} {value} is not what {folder} was saved with, {found}; "
                "change the flag or --load"
            )


def _sharding_metadata(config: RunConfig) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": _data_parallel_group(),
    }
    if config.parallel.use_distributed_optimizer:
        if config.checkpoint.dist_ckpt_optim_fully_reshardable:
            metadata["distrib_optim_sharding_type"] = "fully_reshardable"
            metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
        else:
            metadata["distrib_optim_sharding_type"] = "dp_reshardable"
    return metadata


def _data_parallel_group() -> Any:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _sharded_rng_state(layout: Layout) -> Any:
    from megatron.core import tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject(
        "rng_state",
        [state],
        (layout.pp_size, layout.tp_size),
        (layout.pp_rank, layout.tp_rank),
        replica_id=layout.dp_rank,
    )


def _set_rng_state(state: dict[str, Any]) -> None:
    from megatron.core import tensor_parallel

    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])


def _comparable(common: dict[str, Any]) -> dict[str, Any]:
    """The common state without what may differ between ranks: the order of the optimiser's parameter groups."""
    comparable = {key: value for key, value in common.items() if key != "optimizer"}
    comparable["args"] = vars(comparable["args"])
    return comparable


def _sync_files(folder: Path) -> None:
    for path in [*(folder.rglob("*") if folder.is_dir() else ()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _tracked_iteration(root: Path) -> int | None:
    path = root / TRACKER
    if not path.is_file():
        return None
    text = path.read_text().strip()
    if not text.isdigit():
        raise UserError(f"{path}: says {text!r} where an iteration belongs; write the number of a checkpoint there")
    return int(text)


def _write_tracker(root: Path, iteration: int) -> None:
    beside = root / f".{TRACKER}.partial"
    beside.write_text(str(iteration))
    _sync_files(beside)
    os.replace(beside, root / TRACKER)


def _drop_unretained(root: Path, previous: int | None, current: int, retain_interval: int | None) -> None:
    """Remove the checkpoint before this one, unless its iteration is one to keep."""
    if retain_interval is None or previous in (None, 0, current):
        return
    folder = iteration_folder(root, previous)
    if previous % retain_interval and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
