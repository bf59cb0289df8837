"""Write the language model of a checkpoint as a Hugging Face folder: LlamaForCausalLM or GPT2LMHeadModel.

The model's flags come from the checkpoint, and the tokenizer's do where they are not given. The checkpoint may have
been saved under any parallel layout; this needs one process and no GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_dwm.atomic_write import atomic_folder
from megatron_dwm.cli.command import limit_progress_bars, run_command
from megatron_dwm.config.checkpoint import CheckpointConfig
from megatron_dwm.config.checkpoint_args import effective_arguments, read_arguments
from megatron_dwm.config.flags import build, declared_flags, flag, read
from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.errors import UserError

MODEL_KEYS = "embedding.", "decoder.", "output_layer."


@dataclass(frozen=True)
class ExportConfig:
    """Export."""

    load: str = flag("", "Folder of checkpoints: a run's --save.")
    ckpt_step: int | None = flag(None, "Iteration to export, in place of the latest.")
    output: str = flag("", "Hugging Face folder to write; it must not exist yet.")

    def __post_init__(self) -> None:
        for name in ("load", "output"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing; give a folder")
        if Path(self.output).exists():
            raise UserError(f"--output {self.output} exists; remove it or give another folder")


def export(config: ExportConfig, tokenizer_flags: Mapping[str, Any]) -> str:
    """Write the folder that ``config`` names.

    Args:
        config: the checkpoint, and the folder to write.
        tokenizer_flags: values of TokenizerConfig's fields that take precedence over the checkpoint's.

    Returns:
        a line that says what was written.

    Raises:
        UserError: no such checkpoint, or Hugging Face has no such model.
    """
    from megatron_dwm.data.hf_tokenizers import save_hf_tokenizer
    from megatron_dwm.data.tokenizers import build_tokenizer
    from megatron_dwm.model.hf_model import causal_language_model
    from megatron_dwm.model.vocabulary import saved_softmax_size

    folder = _checkpoint_folder(config)
    saved = read_arguments(folder)
    model = saved_model(saved)
    tokenizer_config = saved_tokenizer(saved, tokenizer_flags)
    tokenizer = build_tokenizer(tokenizer_config)
    full_state = read_model(folder)
    rows = len(full_state["embedding.word_embeddings.weight"])
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model of {folder} only {rows}; give the flags "
            "of the tokenizer that it was trained with"
        )
    vocab_size = max(int(tokenizer.vocab_size), saved_softmax_size(saved, 0))
    language_model = causal_language_model(full_state, model, vocab_size=vocab_size)
    for settings in (language_model.config, language_model.generation_config):
        settings.eos_token_id = int(tokenizer.eod)
    limit_progress_bars()
    with atomic_folder(Path(config.output)) as beside:
        language_model.save_pretrained(beside)
        save_hf_tokenizer(tokenizer, tokenizer_config, beside)
    return (
        f"{config.output}: {type(language_model).__name__} of {language_model.num_parameters():,} parameters, "
        f"{vocab_size:,} tokens, from {folder}"
    )


def saved_model(saved: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration of the model that a checkpoint's arguments describe.

    Raises:
        UserError: it is not a model that this program trains.
    """
    return build(ModelConfig, effective_arguments(saved))


def saved_tokenizer(saved: Mapping[str, Any], given: Mapping[str, Any]) -> TokenizerConfig:
    """Return the configuration of a checkpoint's tokenizer.

    Args:
        saved: the checkpoint's arguments.
        given: values of fields that take precedence over them.
    """
    usable = {item.field for item in declared_flags(TokenizerConfig) if item.refused is None}
    return build(TokenizerConfig, {key: saved[key] for key in usable & saved.keys()} | dict(given))


def read_model(folder: Path) -> dict[str, torch.Tensor]:
    """Return the model's unsharded tensors by checkpoint key; those of layers are stacked, [layers, ...].

    Raises:
        UserError: the checkpoint is damaged, or names code that no checkpoint needs.
    """
    from megatron_dwm.training.saved_checkpoint import open_checkpoint

    saved = open_checkpoint(folder)
    return saved.read_tensors(key for key in saved.shapes if key.startswith(MODEL_KEYS))


def _checkpoint_folder(config: ExportConfig) -> Path:
    from megatron_dwm.config.checkpoint import TRACKER
    from megatron_dwm.training.checkpoint_folders import latest_checkpoint

    folder = latest_checkpoint(CheckpointConfig(load=config.load, ckpt_step=config.ckpt_step))
    if folder is None:
        raise UserError(f"--load {config.load}: no {TRACKER} there; give the folder that a run saved to")
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """Export a checkpoint's language model."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    given = read(argv, [ExportConfig, TokenizerConfig], description=__doc__)
    fields = {item.field for item in declared_flags(TokenizerConfig)}
    print(export(build(ExportConfig, given), {key: value for key, value in given.items() if key in fields}))


if __name__ == "__main__":
    main()
