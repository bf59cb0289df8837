"""Training in several legs, each of which may load a checkpoint first and write one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_dwm.config.checkpoint_args import first_rank_file
from megatron_dwm.model.vocabulary import Vocabulary
from megatron_dwm.training.checkpoint import CheckpointWriter
from megatron_dwm.training.checkpoint_folders import iteration_folder
from megatron_dwm.training.checkpoint_loading import load_checkpoint
from megatron_dwm.training.lr_schedule import Schedule, build_scheduler
from megatron_dwm.training.resume_checks import check_resume
from megatron_dwm.training.saved_checkpoint import SavedCheckpoint, open_checkpoint
from megatron_dwm.training.step import train_step
from megatron_dwm.training.torch_format import open_torch_checkpoint
from megatron_dwm.training.train_state import TrainComponents, TrainState
from tests.distributed.built_model import HfState, build_model, random_tokens
from tests.distributed.harness import checkpoint_manager, run_distributed
from tests.small_runs import NUM_SAMPLES, SEQ_LENGTH, VOCAB_SIZE, Flags

MICRO_BATCH = 4


@dataclass(frozen=True)
class Leg:
    """Some steps of training."""

    flags: Flags
    load: tuple[Path, int] | None = None
    """Folder and iteration of the checkpoint to continue from."""
    save: tuple[Path, int] | None = None
    """Folder of the checkpoint to write, and the step after which it is written."""
    last: int = 4


@dataclass(frozen=True)
class Trained:
    """Results of a leg."""

    losses: list[float]
    """On the last pipeline stage, of each step."""
    rates: list[list[tuple[float, float]]]
    """Learning rate and weight decay of each parameter group, in each step."""
    parameters: HfState
    """At the end."""


def train_legs(processes: int, legs: Sequence[Leg]) -> list[Trained]:
    """Run ``legs`` one after the other; return the last rank's results."""
    manager = checkpoint_manager()

    def work() -> list[Trained]:
        # megatron-core writes from child processes, which a daemon may not start.
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
        filesystem_async._results_queue = manager.Queue()
        return [_train(leg) for leg in legs]

    return run_distributed(work, processes)[-1]


def _train(leg: Leg) -> Trained:
    built = build_model({**leg.flags, "--dwm-mode": "off", "--micro-batch-size": MICRO_BATCH})
    config, optimizer = built.config, built.optimizer
    scheduler = build_scheduler(
        Schedule.from_flags(config.optimizer, config.training, config.sizes.global_batch_size), optimizer
    )
    components, train_state = (
        TrainComponents(built.chunks, optimizer, scheduler, Vocabulary(VOCAB_SIZE)),
        TrainState(),
    )
    if leg.load is not None:
        folder = iteration_folder(*leg.load)
        if (torch_file := first_rank_file(folder)) is not None:
            saved: SavedCheckpoint = open_torch_checkpoint(
                torch_file, config.checkpoint, config.parallel, config.sizes, dist.get_rank()
            )
        else:
            saved = open_checkpoint(folder)
        check_resume(config, saved)
        train_state, _ = load_checkpoint(config, saved, components, built.parallel_state)
    losses: list[float] = []
    rates = []
    mask = torch.ones(NUM_SAMPLES, SEQ_LENGTH)
    for iteration in range(train_state.iteration + 1, leg.last + 1):
        rates.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])
        batch = built.batch(random_tokens(iteration), mask)
        result = train_step(built.engine, optimizer, scheduler, batch, MICRO_BATCH, None)
        losses.append(float("nan") if result.loss is None else result.loss)
        train_state.advance(iteration, NUM_SAMPLES, 0.0)
        if leg.save is not None and leg.save[1] == iteration:
            saving = _saving_to(config, leg.save[0])
            writer = CheckpointWriter(
                saving.checkpoint, saving.parallel, saving.arguments(), components, built.parallel_state
            )
            writer.save(train_state, {})
            writer.close()
    parameters = built.parameters()
    mpu.destroy_model_parallel()
    return Trained(losses, rates, parameters)


def _saving_to(config: Any, folder: Path) -> Any:
    return replace(config, checkpoint=replace(config.checkpoint, save=str(folder)))
