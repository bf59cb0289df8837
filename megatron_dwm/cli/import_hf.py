"""Convert a Hugging Face causal language model to a checkpoint that pretraining can start from.

Llama, Mistral, Qwen2, Qwen2.5, Qwen3, OLMo2, Phi-3, Nemotron and GPT-2 are supported. ``pretrain_dwm.py --load
CHECKPOINTS --finetune`` starts from the checkpoint in any parallel layout, with the model's flags, which are printed.
The import needs one process, no GPU, and memory for little more than one layer.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from megatron_dwm.atomic_write import atomic_folder, atomic_write_text, remove
from megatron_dwm.cli.command import limit_progress_bars, run_command
from megatron_dwm.config.flags import (
    declared_flags,
    flag,
    parse,
    require_at_least,
    require_given,
    require_paths,
    to_argv,
)
from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.run import PARTS
from megatron_dwm.errors import UserError, reported_write_failure

if TYPE_CHECKING:
    from megatron_dwm.model.hf_folder import HuggingFaceModel
    from megatron_dwm.model.hf_weights import Piece
    from megatron_dwm.training.checkpoint_parts import TensorOfParts

ITERATION = 1
"""Iteration of the checkpoint, because Megatron-LM does not accept 0."""


@dataclass(frozen=True)
class ImportConfig:
    """Import."""

    input: str = flag("", "Hugging Face folder of a causal language model.")
    save: str = flag("", "Folder to write the checkpoint to; it must not hold checkpoints yet.")
    make_vocab_size_divisible_by: int = flag(128, "Pad the vocabulary to a multiple of this.")

    def __post_init__(self) -> None:
        require_given(self, "input save", "give a folder")
        require_paths(self, "save")
        require_at_least(self, 1, "make_vocab_size_divisible_by")


def import_model(config: ImportConfig) -> tuple[Path, HuggingFaceModel]:
    """Write the checkpoint named in ``config``, and the tracker file.

    One tensor of one layer is in memory at a time.

    Returns:
        the checkpoint's folder, and the model that was read.

    Raises:
        UserError: there is no such model, its architecture is not supported, or the folder holds checkpoints already.
    """
    from megatron_dwm.config.checkpoint import TRACKER
    from megatron_dwm.data.tokenizers import padded_vocab_size
    from megatron_dwm.model.hf_folder import read_hugging_face
    from megatron_dwm.model.vocabulary import Vocabulary
    from megatron_dwm.training.checkpoint_folders import iteration_folder

    root = Path(config.save)
    if (root / TRACKER).exists():
        raise UserError(f"--save {root}: holds checkpoints already; give another folder")
    limit_progress_bars()
    read = read_hugging_face(Path(config.input))
    model = read.model
    padded = padded_vocab_size(read.vocab_size, config.make_vocab_size_divisible_by, 1)
    arguments = {
        **{item.field: item.default for part in PARTS.values() for item in declared_flags(part)},
        **{item.field: getattr(model, item.field) for item in declared_flags(ModelConfig)},
        "ffn_hidden_size": model.ffn,
        "kv_channels": model.head_size,
        "padded_vocab_size": padded,
        "make_vocab_size_divisible_by": config.make_vocab_size_divisible_by,
        **Vocabulary(padded, read.vocab_size).arguments,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(Path(config.input).resolve()),
        "world_size": 1,
        "data_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "no_save_optim": True,
        "no_save_rng": True,
    }
    folder = iteration_folder(root, ITERATION)
    with reported_write_failure("--save", str(root)):
        with atomic_folder(folder) as temporary:
            write_checkpoint(temporary, read, padded, arguments)
        atomic_write_text(root / TRACKER, str(ITERATION))
    return folder, read


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Lock ``--save`` as a run does, so that no run or other import writes there; remove a new folder on failure.

    Raises:
        UserError: another process has locked it, or it cannot be written to.
    """
    from megatron_dwm.training.save_folder import SaveFolder

    is_new = not root.exists()
    folder = SaveFolder(root)
    try:
        folder.create()
        yield
    except BaseException:
        if is_new:
            remove(root)
        raise
    finally:
        folder.close()


def write_checkpoint(folder: Path, read: HuggingFaceModel, padded_vocab_size: int, arguments: dict[str, Any]) -> None:
    """Write ``folder`` in megatron-core's ``torch_dist`` format, with each layer's part of a tensor as one shard."""
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

    from megatron_dwm.training.checkpoint_checksums import write_checksums
    from megatron_dwm.training.checkpoint_contents import VERSION
    from megatron_dwm.training.checkpoint_parts import write_parts

    tensors = _tensors(read, padded_vocab_size)
    size = sum(math.prod(tensor.size) * tensor.dtype.itemsize for tensor in tensors.values())
    with tqdm(total=size, unit="B", unit_scale=True, desc="import", disable=not os.isatty(2)) as bar:
        write_parts(folder, tensors, _empty_extra_states(read.model), bar.update)
    common = {
        "args": Namespace(**arguments),
        "checkpoint_version": VERSION,
        "iteration": ITERATION,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    torch.save(common, folder / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    write_checksums(folder)


def _tensors(read: HuggingFaceModel, padded_vocab_size: int) -> dict[str, TensorOfParts]:
    """Return the checkpoint's tensors, which are computed when they are written."""
    from megatron_dwm.model.hf_weights import LAYERS, from_hf, pieces, require_finite
    from megatron_dwm.training.checkpoint_parts import TensorOfParts, TensorPart

    model = read.model

    def make_part(piece: Piece) -> torch.Tensor:
        tensor = from_hf(piece, read.state, model, padded_vocab_size)
        return require_finite(f"--input: {' and '.join(piece.names(model))}", tensor)

    made: dict[str, list[TensorPart]] = {}
    described: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for piece in pieces(model, range(model.num_layers)):
        if piece.key not in described:  # all layers have the same shapes: the first one's tensor is made to learn it
            tensor = from_hf(piece, read.state, model, padded_vocab_size)
            described[piece.key] = tensor.shape, tensor.dtype
        shape = tuple(described[piece.key][0])
        make = partial(make_part, piece)
        if piece.layer is None:
            part = TensorPart((0,) * len(shape), shape, make)
        else:
            part = TensorPart((piece.layer, *(0,) * len(shape)), (1, *shape), partial(_as_row, make))
        made.setdefault(piece.key, []).append(part)
    tensors = {}
    for key, parts in made.items():
        size = (model.num_layers, *parts[0].size[1:]) if key.startswith(LAYERS) else parts[0].size
        tensors[key] = TensorOfParts(size, described[key][1], tuple(parts))
    return tensors


def _as_row(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    return make()[None]


def _empty_extra_states(model: ModelConfig) -> dict[str, list[None]]:
    """Return the empty states of FP8 scales that megatron-core expects for each module."""
    modules = (
        *(("self_attention.q_layernorm", "self_attention.k_layernorm") if model.qk_layernorm else ()),
        "self_attention.core_attention",
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    )
    states: dict[str, list[None]] = {
        f"decoder.layers.{module}._extra_state/shard_{layer}_{model.num_layers}": [None]
        for module in modules
        for layer in range(model.num_layers)
    }
    return states | {"decoder.final_layernorm._extra_state/shard_0_1": [None]}


def main(argv: Sequence[str] | None = None) -> None:
    """Import a Hugging Face model."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    config: ImportConfig = parse(argv, {"import": ImportConfig}, description=__doc__)["import"]
    with _locked(Path(config.save)):
        folder, read = import_model(config)
    zeros = f" (its {len(read.state.zeros)} missing biases are zeros)" if read.state.zeros else ""
    print(shlex.join([*to_argv(read.model), "--load", config.save, "--finetune"]))
    print(f"{folder}: wrote the model of {config.input}{zeros}; start from it with the flags above")


if __name__ == "__main__":
    main()
