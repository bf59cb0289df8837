"""Write a Hugging Face LlamaForCausalLM or GPT2LMHeadModel as a checkpoint that pretraining can start from.

``pretrain_dwm.py --load CHECKPOINTS --finetune`` starts from it under any parallel layout, with the model's flags,
which are printed. This needs one process and no GPU.
"""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_dwm.atomic_write import atomic_folder, atomic_write_text
from megatron_dwm.cli.command import limit_progress_bars, run_command
from megatron_dwm.config.flags import declared_flags, flag, parse, require_at_least, to_argv
from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.run import PARTS
from megatron_dwm.errors import UserError

ITERATION = 1
"""Of the checkpoint: Megatron-LM takes 0 for a mistake."""


@dataclass(frozen=True)
class ImportConfig:
    """Import."""

    input: str = flag("", "Hugging Face folder of a LlamaForCausalLM or GPT2LMHeadModel.")
    save: str = flag("", "Folder of checkpoints to write to; it must hold none yet.")
    make_vocab_size_divisible_by: int = flag(128, "Pad the vocabulary to a multiple of this.")

    def __post_init__(self) -> None:
        for name in ("input", "save"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing; give a folder")
        require_at_least(self, 1, "make_vocab_size_divisible_by")


def import_model(config: ImportConfig) -> tuple[Path, ModelConfig]:
    """Write the checkpoint that ``config`` names, and the tracker file beside it.

    Returns:
        the checkpoint's folder, and the configuration of the model.

    Raises:
        UserError: no such model, an architecture that is not trained here, or there are checkpoints already.
    """
    from megatron_dwm.config.checkpoint import TRACKER
    from megatron_dwm.data.tokenizers import padded_vocab_size
    from megatron_dwm.model.hf_folder import read_hugging_face
    from megatron_dwm.model.hf_weights import from_hf_state_dict
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
    with atomic_folder(folder) as beside:
        write_checkpoint(beside, from_hf_state_dict(read.state, model, padded_vocab_size=padded), arguments)
    atomic_write_text(root / TRACKER, str(ITERATION))
    return folder, model


def write_checkpoint(folder: Path, full_state: dict[str, torch.Tensor], arguments: dict[str, Any]) -> None:
    """Fill ``folder`` in megatron-core's ``torch_dist`` format, with one whole shard of every tensor."""
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from torch.distributed.checkpoint.state_dict_saver import save

    from megatron_dwm.training.checkpoint_checksums import write_checksums
    from megatron_dwm.training.checkpoint_contents import VERSION

    save({**full_state, **_empty_extra_states(arguments["num_layers"])}, checkpoint_id=str(folder))
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


def _empty_extra_states(num_layers: int) -> dict[str, list[None]]:
    """Return the states of FP8 scales that megatron-core expects of each module; there are none."""
    modules = (
        "self_attention.core_attention",
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    )
    states: dict[str, list[None]] = {
        f"decoder.layers.{module}._extra_state/shard_{layer}_{num_layers}": [None]
        for module in modules
        for layer in range(num_layers)
    }
    return states | {"decoder.final_layernorm._extra_state/shard_0_1": [None]}


def main(argv: Sequence[str] | None = None) -> None:
    """Import a Hugging Face model."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    config: ImportConfig = parse(argv, {"import": ImportConfig}, description=__doc__)["import"]
    folder, model = import_model(config)
    print(f"{folder}: the model of {config.input}, to be started from with these flags:")
    print(shlex.join([*to_argv(model), "--load", config.save, "--finetune"]))


if __name__ == "__main__":
    main()
