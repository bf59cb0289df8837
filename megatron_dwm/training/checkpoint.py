"""Checkpoints in megatron-core's ``torch_dist`` format, with Megatron-LM's folders.

``<save>/iter_0000100/`` holds what ``checkpoint_contents.py`` names; ``dwm_state.pt`` in it holds the weighter's state;
``<save>/latest_checkpointed_iteration.txt`` names the newest, or says ``release``: then ``<save>/release/`` holds a
model to start from. A checkpoint is written beside its place and put there when it is whole, so an interrupted save
loses nothing.
"""

from __future__ import annotations

import logging
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dwm.atomic_write import atomic_write_text, publish_folder
from megatron_dwm.config.checkpoint import CheckpointConfig
from megatron_dwm.config.checkpoint_args import differing_flag, read_arguments
from megatron_dwm.config.run import RunConfig
from megatron_dwm.errors import UserError
from megatron_dwm.runtime.logging import timestamp
from megatron_dwm.runtime.process_groups import ParallelState
from megatron_dwm.training.checkpoint_contents import (
    comparable,
    data_parallel_group,
    megatron_arguments,
    model_key,
    set_rng_state,
    sharded_state,
    sharding_metadata,
)
from megatron_dwm.training.checkpoint_folders import (
    DWM_STATE,
    RELEASE,
    TRACKER,
    iteration_folder,
    iteration_of,
    latest_checkpoint,
    non_persistent_folder,
    tracked,
)
from megatron_dwm.training.optimizer import allocate_state, load_optimizer
from megatron_dwm.training.train_state import TrainComponents, TrainState

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes checkpoints; with ``--async-save`` while training goes on.

    Every method is collective.
    """

    def __init__(self, config: RunConfig, components: TrainComponents, parallel_state: ParallelState) -> None:
        self.config, self.components, self.parallel_state = config, components, parallel_state
        self._queue: Any = None
        if config.checkpoint.async_save:
            from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

            # A process with a CUDA context must not be forked: there megatron-core's own worker writes.
            self._queue = AsyncCallsQueue(persistent=torch.cuda.is_available())

    def save(self, train_state: TrainState, dwm_state: dict[str, Any], *, persistent: bool = True) -> None:
        """Write a checkpoint, or begin to.

        Args:
            dwm_state: the weighting's state; none is written if it is empty.
            persistent: whether it is to stay until ``--save-retain-interval`` says otherwise; of the others only the
                newest two are kept.
        """
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
        from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

        self.finish()  # one at a time
        flags, iteration = self.config.checkpoint, train_state.iteration
        save = flags.save or "."
        root = Path(save) if persistent else non_persistent_folder(flags, save)
        beside = root / f".{iteration_folder(root, iteration).name}.partial"
        logger.info(f"[{timestamp()}] saving checkpoint at iteration {iteration:7d} to {root} in torch_dist format")
        if self.parallel_state.is_first_rank:
            if not persistent:
                _drop_all_but_newest(root)
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            if dwm_state:
                torch.save(dwm_state, beside / DWM_STATE)
        dist.barrier()

        metadata = sharding_metadata(self.config)
        state = sharded_state(
            self.config,
            self.components,
            train_state,
            self.parallel_state,
            metadata,
            is_loading=False,
            with_optimizer=not flags.no_save_optim,
            with_rng=not flags.no_save_rng,
        )
        strategy = get_default_save_sharded_strategy("torch_dist")
        if flags.ckpt_fully_parallel_save:
            strategy = FullyParallelSaveStrategyWrapper(strategy, data_parallel_group())
        request = dist_checkpointing.save(
            state,
            str(beside),
            strategy,
            async_sharded_save=self._queue is not None,
            preprocess_common_before_consistancy_check=comparable,
            content_metadata={key: value for key, value in metadata.items() if key != "dp_cp_group"},
        )
        if self._queue is None:
            dist.barrier()
            self._publish(root, beside, iteration)
            dist.barrier()
            return
        request.add_finalize_fn(lambda: self._publish(root, beside, iteration))
        self._queue.schedule_async_request(request)
        logger.info(f"  [{timestamp()}] scheduled an async checkpoint save at iteration {iteration:7d} to {root}")

    def poll(self) -> None:
        """Put a checkpoint that has been written in the background into its place."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait until the last checkpoint is in its place."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=True)

    def close(self) -> None:
        """Finish, and end the background's worker."""
        if self._queue is not None:
            self._queue.close()

    def _publish(self, root: Path, beside: Path, iteration: int) -> None:
        """Put the whole checkpoint into its place and name it as the latest; the first rank's work."""
        if not self.parallel_state.is_first_rank:
            return
        final = iteration_folder(root, iteration)
        publish_folder(beside, final)
        previous = tracked(root)
        atomic_write_text(root / TRACKER, str(iteration))
        logger.info(
            f"  [{timestamp()}] successfully saved checkpoint from iteration {iteration:7d} to {root} "
            f"{self.parallel_state.tp_pp_label}"
        )
        retained = self.config.checkpoint.save_retain_interval
        if root == Path(self.config.checkpoint.save or ".") and _unretained(previous, final, retained):
            assert previous is not None
            shutil.rmtree(previous, ignore_errors=True)
            number = iteration_of(previous)
            logger.info(f"  [{timestamp()}] successfully deleted checkpoint from iteration {number:7d} at {root}")


def saved_arguments(flags: CheckpointConfig) -> dict[str, Any]:
    """The arguments of the checkpoint that the flags name, for ``--use-checkpoint-args``.

    Raises:
        UserError: there is no checkpoint, or it holds no arguments.
    """
    folder = latest_checkpoint(flags)
    if folder is None:
        raise UserError(f"--use-checkpoint-args: --load {flags.load} holds no checkpoint; give a folder that does")
    return read_arguments(folder)


def load_checkpoint(
    config: RunConfig, folder: Path, components: TrainComponents, parallel_state: ParallelState
) -> tuple[TrainState, dict[str, Any] | None]:
    """Restore ``objects`` from ``folder``; every rank calls it.

    Returns:
        the progress the checkpoint was saved at (zero with ``--finetune``, iteration zero of a release) and the
        weighter's state, if it has one.

    Raises:
        UserError: the checkpoint is of another model, or its optimizer cannot be loaded under this layout.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper

    flags = config.checkpoint
    common = dist_checkpointing.load_common_state_dict(str(folder))
    saved = common.get("args", Namespace())
    _check_same_model(config, saved)
    same_layout = (
        getattr(saved, "tensor_model_parallel_size", 1),
        getattr(saved, "pipeline_model_parallel_size", 1),
    ) == (config.parallel.tp, config.parallel.pp)
    anew = flags.finetune or folder.name == RELEASE
    with_optimizer = not (anew or flags.no_load_optim or getattr(saved, "no_save_optim", False))
    with_rng = not (anew or flags.no_load_rng or getattr(saved, "no_save_rng", False)) and same_layout

    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {}
    sharding = metadata.get("distrib_optim_sharding_type")
    moves_optimizer = with_optimizer and config.parallel.use_distributed_optimizer and not same_layout
    if moves_optimizer and sharding != "fully_reshardable":
        raise UserError(
            f"--load {flags.load}: the distributed optimizer's state was saved as {sharding} and cannot move to "
            "another TP or PP size; save with --dist-ckpt-optim-fully-reshardable, or load with --no-load-optim"
        )
    metadata["dp_cp_group"] = data_parallel_group()
    if with_optimizer:
        allocate_state(components.optimizer)
    template = sharded_state(
        config,
        components,
        TrainState(),
        parallel_state,
        metadata,
        is_loading=True,
        with_optimizer=with_optimizer,
        with_rng=with_rng,
    )
    strategy = get_default_load_sharded_strategy(str(folder))
    if flags.ckpt_fully_parallel_load:
        strategy = FullyParallelLoadStrategyWrapper(strategy, data_parallel_group())
    state = dist_checkpointing.load(template, str(folder), strategy, strict="assume_ok_unexpected")

    for number, chunk in enumerate(components.chunks):
        chunk.load_state_dict(state[model_key(components, number)])
    if with_optimizer:
        load_optimizer(components.optimizer, state["optimizer"])
        components.scheduler.load_state_dict(state["opt_param_scheduler"])
    elif config.optimizer.fp16 or config.optimizer.bf16:
        components.optimizer.reload_model_params()
    if with_rng:
        set_rng_state(state["rng_state"][0])
    dist.barrier()
    if flags.finetune:
        done = state.get("num_floating_point_operations_so_far", 0)
        return TrainState(num_floating_point_operations_so_far=done), None
    train_state = TrainState(
        iteration=0 if anew else state["iteration"],
        consumed_train_samples=getattr(saved, "consumed_train_samples", 0),
        skipped_train_samples=getattr(saved, "skipped_train_samples", 0),
        consumed_valid_samples=getattr(saved, "consumed_valid_samples", 0),
        num_floating_point_operations_so_far=state.get("num_floating_point_operations_so_far", 0),
    )
    path = folder / DWM_STATE
    has_weighter = path.is_file() and not anew
    return train_state, torch.load(path, map_location="cpu", weights_only=True) if has_weighter else None


def _check_same_model(config: RunConfig, saved: Namespace) -> None:
    finetune = config.checkpoint.finetune
    run = vars(megatron_arguments(config, TrainState()))
    if difference := differing_flag(run, vars(saved), finetune=finetune):
        raise UserError(f"--load {config.checkpoint.load}: {difference}")


def _unretained(previous: Path | None, current: Path, retain_interval: int | None) -> bool:
    """Whether the checkpoint before this one is not to be kept."""
    if retain_interval is None or previous is None or previous == current or previous.is_symlink():
        return False
    return iteration_of(previous) % retain_interval != 0  # 0, a release, is kept


def _drop_all_but_newest(root: Path) -> None:
    for folder in sorted(root.glob("iter_*"))[:-1]:
        shutil.rmtree(folder)
