"""What a checkpoint says of the run that saved it, for the commands that export from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dwm.analysis.start_folder import find_start_folder
from megatron_dwm.config.checkpoint import TRACKER, CheckpointConfig
from megatron_dwm.config.checkpoint_args import effective_arguments
from megatron_dwm.config.flags import build, declared_flags, flag, require_given, require_paths
from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.errors import UserError
from megatron_dwm.training.save_folder import check_writable


@dataclass(frozen=True)
class ExportArguments:
    """Flags of a command that exports from a checkpoint."""

    load: str = flag("", "Folder of checkpoints: a run's --save.")
    ckpt_step: int | None = flag(None, "Iteration of the checkpoint to export, instead of the latest.")
    output: str = flag("", "Hugging Face folder to write; it must not exist yet.")

    def __post_init__(self) -> None:
        require_given(self, "load output", "give a folder")
        require_paths(self, "output")
        if Path(self.output).exists():
            raise UserError(f"--output {self.output} exists; remove it or give another folder")
        check_writable({"--output": Path(self.output)})


def checkpoint_folder(load: str, ckpt_step: int | None) -> Path:
    """Return the folder of the checkpoint that ``--load`` and ``--ckpt-step`` name.

    Raises:
        UserError: there is none.
    """
    from megatron_dwm.training.checkpoint_folders import latest_checkpoint

    folder = latest_checkpoint(CheckpointConfig(load=load, ckpt_step=ckpt_step))
    if folder is None:
        raise UserError(f"--load {load}: no {TRACKER} there; give the folder that a run saved to")
    return folder


def saved_model(saved: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration of the model that a checkpoint's arguments describe.

    Raises:
        UserError: it is not a model that this program trains.
    """
    return build(ModelConfig, effective_arguments(saved))


def find_tokenizer(saved: Mapping[str, Any], load: str) -> dict[str, Any]:
    """Return a checkpoint's arguments, with paths of its tokenizer that are valid from the current folder.

    Args:
        saved: the arguments; relative paths refer to the folder that the run was started from.
        load: folder of the checkpoints.
    """
    found = dict(saved)
    values = {name: saved.get(name) for name in ("tokenizer_model", "vocab_file", "merge_file")}
    missing = {name: str(value) for name, value in values.items() if value and not Path(str(value)).exists()}
    if missing:
        folder = find_start_folder(Path(load), saved.get("save"), list(missing.values()))
        found |= {name: str(folder / path) for name, path in missing.items() if (folder / path).exists()}
    return found


def saved_tokenizer(saved: Mapping[str, Any], given: Mapping[str, Any]) -> TokenizerConfig:
    """Return the configuration of a checkpoint's tokenizer.

    Args:
        saved: the checkpoint's arguments.
        given: values of fields that take precedence over them.
    """
    usable = {item.field for item in declared_flags(TokenizerConfig) if item.refused is None}
    return build(TokenizerConfig, {key: saved[key] for key in usable & saved.keys()} | dict(given))
