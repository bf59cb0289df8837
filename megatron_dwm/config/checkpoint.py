"""Flags of saving and loading."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_dwm.config.flags import flag, flag_name, require_at_least, require_paths
from megatron_dwm.errors import UserError

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
"""The file that names the newest checkpoint of a folder."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints."""

    save: str | None = flag(None, "Folder to write checkpoints to.")
    save_interval: int | None = flag(
        None, "Iterations between checkpoints.", "--save-interval", "--persistent-save-interval"
    )
    save_retain_interval: int | None = flag(
        None, "Keep only checkpoints whose iteration is divisible by this, and the last one."
    )
    load: str | None = flag(None, "Folder to continue from.")
    no_save_optim: bool = flag(False, "Leave the optimizer's state out of checkpoints.")
    no_save_rng: bool = flag(False, "Leave the random state out of checkpoints.")
    no_load_optim: bool = flag(False, "Do not load the optimizer's state.")
    no_load_rng: bool = flag(False, "Do not load the random state.")
    finetune: bool = flag(False, "Load the weights only and start at iteration 0.")
    ckpt_step: int | None = flag(None, "Iteration of the checkpoint to load, instead of the latest.")
    exit_on_missing_checkpoint: bool = flag(
        False, "Stop if --load holds no checkpoint, instead of starting from scratch."
    )
    ckpt_format: Literal["torch", "torch_dist"] = flag(
        "torch_dist",
        "Format of the checkpoints that are saved: torch_dist, which any layout can load, or torch, which only a run "
        "with the same layout can load. The format of --load is detected from its files.",
    )
    ckpt_convert_format: Literal["torch", "torch_dist"] | None = flag(
        None, "Do not train; write the checkpoint of --load in this format to --ckpt-convert-save."
    )
    ckpt_convert_save: str | None = flag(
        None, "Folder to which --ckpt-convert-format writes, in a subfolder with the name of the --load folder."
    )
    dist_ckpt_strictness: Literal[
        "assume_ok_unexpected",
        "log_unexpected",
        "log_all",
        "raise_unexpected",
        "raise_all",
        "return_unexpected",
        "return_all",
        "ignore_all",
    ] = flag(
        "assume_ok_unexpected",
        "How to treat tensors that only the model or only the checkpoint has: raise_* is an error, log_* and return_* "
        "log them, ignore_all ignores them. *_unexpected covers tensors that only the model has, *_all covers both.",
    )
    pretrained_checkpoint: str | None = flag(
        None, "Folder of a model to start from, as with --finetune, if --load holds no checkpoint yet."
    )
    ckpt_fully_parallel_save: bool = flag(
        True,
        "Let one data-parallel rank write everything.",
        "--no-ckpt-fully-parallel-save",
        "--disable-ckpt-fully-parallel-save",
    )
    ckpt_fully_parallel_load: bool = flag(False, "Spread loading over data-parallel ranks.")
    dist_ckpt_optim_fully_reshardable: bool = flag(
        False, "Save the distributed optimizer so that it can be loaded under another TP and PP size."
    )
    async_save: bool = flag(False, "Write checkpoints in the background while training continues.")
    ckpt_assume_constant_structure: bool = flag(
        False, "Plan the writing of a checkpoint once, and reuse the plan for later ones."
    )
    non_persistent_save_interval: int | None = flag(
        None, "Iterations between non-persistent checkpoints, of which only the newest two are kept."
    )
    non_persistent_ckpt_type: Literal["global"] | None = flag(
        None,
        "Write non-persistent checkpoints to a folder that all ranks share (global); load one if it is the newest.",
    )
    non_persistent_global_ckpt_dir: str | None = flag(
        None, "Folder of non-persistent checkpoints. Default: non_persistent in the --save or --load folder."
    )
    checkpoint_checksums: bool = flag(
        True,
        "Do not write checksums of a checkpoint's files, and do not verify them when it is loaded.",
        "--no-checkpoint-checksums",
    )
    use_checkpoint_args: bool = flag(
        False, "Take the model's flags from the checkpoint; sizes only if they are not given."
    )

    def __post_init__(self) -> None:
        require_paths(self, "save load ckpt_convert_save pretrained_checkpoint non_persistent_global_ckpt_dir")
        require_at_least(self, 0 if self.save is None else 1, "save_interval")  # as in Megatron-LM
        require_at_least(self, 1, "save_retain_interval non_persistent_save_interval")
        if self.save_interval is not None and self.save is None:
            logger.warning(
                f"--save-interval {self.save_interval} has no effect without --save; give --save to save checkpoints"
            )
        if self.non_persistent_save_interval is not None and self.save is None:
            raise UserError(
                f"--non-persistent-save-interval {self.non_persistent_save_interval} needs --save; give the folder"
            )
        if (self.ckpt_convert_format is None) != (self.ckpt_convert_save is None):
            raise UserError("--ckpt-convert-format and --ckpt-convert-save need each other; give both")
        if self.ckpt_format == "torch" and self.async_save:
            raise UserError("--ckpt-format torch cannot be written in the background; leave --async-save out")
        if self.non_persistent_save_interval is not None and self.non_persistent_ckpt_type is None:
            raise UserError(
                f"--non-persistent-save-interval {self.non_persistent_save_interval} needs "
                "--non-persistent-ckpt-type global; add it"
            )
        other = self.non_persistent_global_ckpt_dir
        if other and self.save and Path(other).resolve() == Path(self.save).resolve():
            raise UserError(
                f"--non-persistent-global-ckpt-dir {other} is also --save, where checkpoints are kept; give another"
            )
        for name in ("exit_on_missing_checkpoint", "use_checkpoint_args", "ckpt_convert_format"):
            if getattr(self, name) and self.load is None and self.pretrained_checkpoint is None:
                raise UserError(f"{flag_name(name)} needs --load; give the folder")

    @property
    def should_tolerate_differences(self) -> bool:
        """Whether a model may be loaded from a checkpoint that lacks some of its tensors."""
        return self.dist_ckpt_strictness.partition("_")[0] in ("log", "return", "ignore")
