"""Write the language model of a checkpoint as a Hugging Face folder.

It becomes a Llama, Mistral, Qwen2, Qwen3, OLMo2, Phi-3, Nemotron or GPT-2. The model's flags come from the checkpoint,
and so do those of the tokenizer unless they are given. The checkpoint may have been saved in any parallel layout; the
export needs one process, no GPU, and memory for one weight file. The folder is loaded again and compared with the
checkpoint before it appears under its final name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from megatron_dwm.atomic_write import atomic_folder
from megatron_dwm.cli.command import limit_progress_bars, run_command
from megatron_dwm.cli.saved_run import (
    ExportArguments,
    checkpoint_folder,
    find_tokenizer,
    saved_model,
    saved_tokenizer,
)
from megatron_dwm.config.checkpoint_args import read_arguments
from megatron_dwm.config.flags import build, declared_flags, flag, read
from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.errors import UserError, reported_write_failure

if TYPE_CHECKING:
    from megatron_dwm.training.saved_checkpoint import SavedCheckpoint

_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class ExportConfig(ExportArguments):
    """Export."""

    max_shard_size: str = flag("5GB", "Maximum size of a weight file; the tensors of one file are in memory at a time.")


def export(config: ExportConfig, tokenizer_flags: Mapping[str, Any]) -> str:
    """Write the folder named in ``config``, and compare it with the checkpoint.

    The tensors of one weight file are in memory at a time.

    Args:
        config: the checkpoint, and the folder to write.
        tokenizer_flags: values of TokenizerConfig's fields that take precedence over the checkpoint's.

    Returns:
        a line that describes what was written.

    Raises:
        UserError: no such checkpoint, or Hugging Face has no such model.
    """
    from megatron_dwm.data.hf_tokenizers import is_loaded_unchanged, save_hf_tokenizer
    from megatron_dwm.data.tokenizer_folder import load_tokenizer_folder
    from megatron_dwm.data.tokenizers import build_tokenizer
    from megatron_dwm.model.hf_card import language_model_card
    from megatron_dwm.model.hf_config import architecture, hf_config
    from megatron_dwm.model.hf_model import hf_skeleton, hf_tensors, write_weights
    from megatron_dwm.model.hf_weights import require_finite
    from megatron_dwm.model.vocabulary import saved_tokens
    from megatron_dwm.training.saved_checkpoint import open_checkpoint

    folder = checkpoint_folder(config.load, config.ckpt_step)
    saved = find_tokenizer(read_arguments(folder), config.load)
    model = saved_model(saved)
    tokenizer_config = saved_tokenizer(saved, tokenizer_flags)
    tokenizer = build_tokenizer(tokenizer_config)
    checkpoint = open_checkpoint(folder)
    _check_tensors(checkpoint, model)
    rows = checkpoint.shapes[_EMBEDDING][0]
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model of {folder} only {rows}; give the flags "
            "of the tokenizer that it was trained with"
        )
    vocab_size = max(int(tokenizer.vocab_size), saved_tokens(saved) or 0)
    dtype = checkpoint.metadata.state_dict_metadata[_EMBEDDING].properties.dtype
    has_any_tokenizer = not is_loaded_unchanged(architecture(model), tokenizer, tokenizer_config)
    skeleton = hf_skeleton(
        hf_config(model, vocab_size=vocab_size, num_layers=model.num_layers, has_any_tokenizer=has_any_tokenizer), dtype
    )
    limit_progress_bars()
    size = sum(p.numel() * p.element_size() for p in skeleton.parameters())
    bar = tqdm(total=2 * size, unit="B", unit_scale=True, desc="export", disable=not os.isatty(2))

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        prefix = skeleton.base_model_prefix
        for name, tensor in hf_tensors(model, prefix, vocab_size, lambda p: checkpoint.read_row(p.key, p.layer)):
            bar.update(tensor.numel() * tensor.element_size())
            yield name, require_finite(f"--load {folder}: {name}", tensor)

    writing = reported_write_failure("--output", config.output)
    with bar, writing, atomic_folder(Path(config.output)) as temporary:
        try:
            write_weights(temporary, skeleton, tensors(), config.max_shard_size)
        except ValueError as error:
            raise UserError(
                f"--load {folder}: cannot be exported ({error}); give another checkpoint or size"
            ) from error
        skeleton.config.save_pretrained(temporary)
        save_hf_tokenizer(tokenizer, tokenizer_config, temporary, model.seq_length)
        counterpart = load_tokenizer_folder(temporary)
        _complete_settings(skeleton, counterpart, temporary, window=model.seq_length)
        count = _verify(temporary, skeleton, tensors())
        card = language_model_card(
            saved, skeleton, counterpart, name=Path(config.output).name, effect=_effect(config.load)
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return (
        f"{config.output}: wrote a {type(skeleton).__name__} of {skeleton.num_parameters():,} parameters, "
        f"{vocab_size:,} tokens, from {folder}; loaded again, its {count} tensors are the checkpoint's"
    )


def _effect(load: str) -> str | None:
    """Return the loss in the run's records; None if there are none."""
    from megatron_dwm.analysis.records import read_run, records_file

    if not records_file(Path(load)).is_file():
        return None
    run = read_run(Path(load))
    evaluations = run.evaluated("valid") or run.evaluated("test")
    if not evaluations:
        return "The run had no evaluations."
    last = evaluations[-1]
    return f"Loss of {last['lm_loss']:.4f} on the {last['split']} data at iteration {last['iteration']}."


def _check_tensors(checkpoint: SavedCheckpoint, model: ModelConfig) -> None:
    """Refuse a checkpoint whose tensors do not match the model that its arguments describe."""
    from megatron_dwm.model.hf_weights import pieces

    for piece in pieces(model, range(model.num_layers)):
        shape = checkpoint.shapes.get(piece.key)
        if shape is None or (piece.layer is not None and shape[0] != model.num_layers):
            found = "is missing" if shape is None else f"has {shape[0]} layers"
            raise UserError(
                f"{checkpoint.folder} does not hold the model that its arguments describe: {piece.key} {found}; give "
                "another checkpoint"
            )


def _complete_settings(skeleton: Any, tokenizer: Any, folder: Path, *, window: int) -> None:
    """Write config.json and generation_config.json with the tokenizer's special tokens and the trained window."""
    config, generation = skeleton.config, skeleton.generation_config
    for settings in (config, generation):
        settings.bos_token_id, settings.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    if tokenizer.pad_token_id != tokenizer.eos_token_id:  # the embedding of a padding token is not trained
        config.pad_token_id = tokenizer.pad_token_id
    generation.max_length = window
    config.architectures = [type(skeleton).__name__]
    config.save_pretrained(folder)
    generation.save_pretrained(folder)


def _verify(folder: Path, skeleton: Any, tensors: Iterator[tuple[str, torch.Tensor]]) -> int:
    """Load the folder again, and compare it with the checkpoint.

    Args:
        folder: the folder that was written.
        skeleton: the model, without storage.
        tensors: the checkpoint's, by Hugging Face name.

    Returns:
        the number of tensors.

    Raises:
        UserError: it cannot be loaded, or differs from the checkpoint.
    """
    from transformers import AutoConfig

    from megatron_dwm.model.hf_folder import read_hugging_face

    read = read_hugging_face(folder, "--output")
    found = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).to_dict()
    expected = skeleton.config.to_dict()
    if differing := [name for name in expected if name[0] != "_" and found.get(name) != expected[name]]:
        raise UserError(f"--output {folder}: loaded again, it has a different {differing[0]}; export it again")
    count = 0
    for name, tensor in tensors:
        if not torch.equal(read.state.files[name], tensor.to(skeleton.dtype)):
            raise UserError(f"--output {folder}: loaded again, {name} differs from the checkpoint's; export it again")
        count += 1
    return count


def main(argv: Sequence[str] | None = None) -> None:
    """Export a checkpoint's language model."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    given = read(argv, [ExportConfig, TokenizerConfig], description=__doc__)
    fields = {item.field for item in declared_flags(TokenizerConfig)}
    print(export(build(ExportConfig, given), {key: value for key, value in given.items() if key in fields}))


if __name__ == "__main__":
    main()
