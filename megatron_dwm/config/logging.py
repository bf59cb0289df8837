"""Flags of logging."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_dwm.config.flags import flag, require_at_least, require_paths
from megatron_dwm.errors import UserError

RECORDS = "metrics.jsonl"
"""The file of a run's records in its ``--save`` folder."""


@dataclass(frozen=True)
class LoggingConfig:
    """Logging."""

    log_interval: int = flag(100, "Iterations between log lines.")
    log_throughput: bool = flag(False, "Log the throughput in TFLOP/s per GPU.")
    log_progress: bool = flag(
        False, "Write progress.txt to the --save folder: starts of the run, and its throughput at each checkpoint."
    )
    dwm_peak_tflops: float | None = flag(
        None,
        "Peak TFLOP/s of a device, from which the log computes the MFU of plain training's operations. Default: by the "
        "device's name, in 16-bit training.",
    )
    log_params_norm: bool = flag(False, "Log the norm of the parameters.")
    tensorboard_dir: str | None = flag(None, "Folder for TensorBoard's event files.")
    tensorboard_log_interval: int = flag(1, "Iterations between TensorBoard records.")
    tensorboard_queue_size: int = flag(1000, "Records that TensorBoard keeps before it writes them.")
    log_validation_ppl_to_tensorboard: bool = flag(False, "Also write the validation perplexity.")
    log_loss_scale_to_tensorboard: bool = flag(
        True,
        "Do not write the loss scale.",
        "--no-log-loss-scale-to-tensorboard",
        "--disable-log-loss-scale-to-tensorboard",
    )
    log_memory_to_tensorboard: bool = flag(False, "Write the GPU's memory statistics.")
    log_world_size_to_tensorboard: bool = flag(False, "Write the world size.")
    log_memory_interval: int | None = flag(None, "Iterations between reports of the GPU's memory in the log.")
    log_device_memory_used: bool = flag(False, "Also report how much of the GPU's memory all programs use.")
    logging_level: int | None = flag(
        None, "Lowest level of megatron-core's messages that are logged, as a number of Python's logging (20 is INFO)."
    )
    wandb_project: str | None = flag(
        None,
        "Project of Weights & Biases that records go to; WANDB_MODE=offline keeps them in a folder.",
        old_names=("--wandb-project-name",),
    )
    wandb_entity: str | None = flag(
        None, "User or team that --wandb-project belongs to.", old_names=("--wandb-entity-name",)
    )
    wandb_exp_name: str | None = flag(None, "Name of the run in --wandb-project.", old_names=("--wandb-name",))
    wandb_save_dir: str | None = flag(
        None, "Folder for the files of Weights & Biases. Default: wandb in the --save folder."
    )
    metrics_jsonl: str | None = flag(
        None, "JSON-lines file for every record. Default: metrics.jsonl in the --save folder."
    )

    def __post_init__(self) -> None:
        require_paths(self, "tensorboard_dir metrics_jsonl wandb_save_dir")
        require_at_least(self, 1, "log_interval tensorboard_log_interval log_memory_interval")
        if self.dwm_peak_tflops is not None and self.dwm_peak_tflops <= 0:
            raise UserError(f"--dwm-peak-tflops {self.dwm_peak_tflops}: must be above 0")

    def records_file(self, save: str | None) -> Path | None:
        """Return the JSON-lines file of a run that saves to ``save``; None if it writes none."""
        if self.metrics_jsonl is not None:
            return Path(self.metrics_jsonl)
        return None if save is None else Path(save) / RECORDS

    def wandb_folder(self, save: str | None) -> Path:
        """Return the folder for the files of Weights & Biases of a run that saves to ``save``."""
        return Path(self.wandb_save_dir or Path(save or ".") / "wandb")
