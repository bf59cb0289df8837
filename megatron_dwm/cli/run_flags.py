"""The flags of a pretraining run, completed from the checkpoints that they name."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dwm.config.checkpoint import TRACKER, CheckpointConfig
from megatron_dwm.config.run import RunConfig, parse_run
from megatron_dwm.errors import renamed_flags
from megatron_dwm.training.checkpoint_folders import checkpoints_in, latest_checkpoint, saved_arguments
from megatron_dwm.training.save_folder import check_writable

logger = logging.getLogger(__name__)


def read_run_flags(argv: Sequence[str] | None, world_size: int) -> RunConfig:
    """Return the configuration of a pretraining run; by default from this process's command line.

    Raises:
        UserError: a bad flag, or a folder of one that cannot be read or written.
    """
    return _with_conversion(_with_pretrained(parse_run(argv, world_size, read_saved=_read_saved)))


def _with_pretrained(config: RunConfig) -> RunConfig:
    """Return the configuration that starts from ``--pretrained-checkpoint``, if that applies."""
    checkpoint = _from_pretrained(config.checkpoint)
    if checkpoint is not config.checkpoint:
        logger.info(f" > --load {config.checkpoint.load} holds no checkpoint: the run starts from {checkpoint.load}")
    return dataclasses.replace(config, checkpoint=checkpoint)


def _from_pretrained(flags: CheckpointConfig) -> CheckpointConfig:
    """Return the flags that load ``--pretrained-checkpoint``, if that applies.

    It applies while ``--load`` holds no checkpoint; as in Megatron-LM, the run then continues as with ``--finetune``.

    Raises:
        UserError: it holds no checkpoint.
    """
    if flags.pretrained_checkpoint is None:
        return flags
    if flags.load is not None and ((Path(flags.load) / TRACKER).is_file() or checkpoints_in(Path(flags.load))):
        return flags
    pretrained = dataclasses.replace(flags, load=flags.pretrained_checkpoint, ckpt_step=None, finetune=True)
    with renamed_flags({"--load": "--pretrained-checkpoint"}):
        latest_checkpoint(pretrained)
    return pretrained


def _with_conversion(config: RunConfig) -> RunConfig:
    """Return the configuration that saves in ``--ckpt-convert-format``, if it is given."""
    flags = config.checkpoint
    if flags.ckpt_convert_format is None or flags.ckpt_convert_save is None or flags.load is None:
        return config
    save = Path(flags.ckpt_convert_save) / Path(flags.load).name
    check_writable({"--ckpt-convert-save": save})
    checkpoint = dataclasses.replace(
        flags, save=str(save), ckpt_format=flags.ckpt_convert_format, async_save=False, exit_on_missing_checkpoint=True
    )
    return dataclasses.replace(config, checkpoint=checkpoint)


def _read_saved(flags: CheckpointConfig) -> Mapping[str, Any]:
    return saved_arguments(_from_pretrained(flags))
