"""The files that a run will write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_dwm.config.checkpoint import TRACKER
from megatron_dwm.config.run import RunConfig
from megatron_dwm.training.checkpoint_folders import non_persistent_folder
from megatron_dwm.training.run_status import RUN_STATUS
from megatron_dwm.weighting.stage_schedule import StageSchedule


@dataclass(frozen=True)
class PlannedFile:
    """A file or folder that a run writes, once or repeatedly."""

    path: str
    what: str
    times: int
    size: int | None = None
    """Bytes of each; None if unknown or small."""


def planned_files(
    config: RunConfig, stages: StageSchedule, model_parameters: int, weighter_parameters: int | None
) -> list[PlannedFile]:
    """Return the files that a run writes.

    Args:
        model_parameters: number of parameters of the language model, each counted once.
        weighter_parameters: None without a weighter.
    """
    files, logging, save = [], config.logging, config.checkpoint.save
    if save is not None:
        files += _saved(config, Path(save), stages, model_parameters, weighter_parameters)
    records = logging.records_file(save)
    if records is not None:
        files.append(PlannedFile(str(records), "a record of every iteration, update and evaluation", 1))
    if logging.log_progress:
        files.append(PlannedFile(f"{save}/progress.txt", "starts and checkpoints of the run", 1))
    if logging.tensorboard_dir is not None:
        files.append(PlannedFile(logging.tensorboard_dir, "TensorBoard's event files", 1))
    if logging.wandb_project is not None:
        files.append(PlannedFile(str(logging.wandb_folder(save)), "Weights & Biases' files", 1))
    if config.profiling.record_memory_history:
        files.append(PlannedFile(config.profiling.memory_snapshot_path, "the allocations of the last rank's GPU", 1))
    if config.data.data_cache_path is not None:
        files.append(PlannedFile(config.data.data_cache_path, "indexes of the datasets", 1))
    return files


def _saved(
    config: RunConfig, save: Path, stages: StageSchedule, model_parameters: int, weighter_parameters: int | None
) -> list[PlannedFile]:
    flags = config.checkpoint
    saves = _saves(flags.save_interval, config.train_iters)
    model = model_parameters * config.optimizer.params_dtype.itemsize
    moments = {"adam": 2, "sgd": 1}[config.optimizer.optimizer]
    copies = config.optimizer.bf16 or config.optimizer.fp16
    optimizer = 0 if flags.no_save_optim else 4 * model_parameters * (moments + copies)
    weighting = 4 * model_parameters if config.weighting.target_momentum > 0 else 0  # the mean of the target gradient
    size = model + optimizer + weighting
    files = [
        PlannedFile(str(save / "iter_XXXXXXX"), "checkpoints", len(saves), size),
        PlannedFile(str(save / TRACKER), "the newest checkpoint's iteration", len(saves)),
        PlannedFile(str(save / RUN_STATUS), "whether the run is running, interrupted or finished", 2),
    ]
    if flags.non_persistent_save_interval is not None:
        folder = str(non_persistent_folder(flags, str(save)))
        times = config.train_iters // flags.non_persistent_save_interval
        files.append(PlannedFile(folder, "checkpoints of which the newest two are kept", times, size))
    if weighter_parameters is not None:
        ends = {i for i in range(1, config.train_iters + 1) if stages.is_stage_end(i)}
        exports = {i for i in saves | ends if stages.is_weighted(i)}
        is_trained = config.weighting.needs_target
        count = len(exports if is_trained else {i for i in saves if stages.is_weighted(i)})
        files.append(
            PlannedFile(str(save / "weighter/iter_XXXXXXX"), "exports of the weighter", count, 4 * weighter_parameters)
        )
    return files


def _saves(interval: int | None, train_iters: int) -> set[int]:
    """Return the iterations after which a checkpoint is written."""
    return {train_iters, *range(interval, train_iters + 1, interval)} if interval else {train_iters}
