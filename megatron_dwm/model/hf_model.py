"""Export of the language model to Hugging Face: its first layers in memory, or all of it to files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.model.full_state import gather_full_state
from megatron_dwm.model.hf_weights import Piece, pieces, to_hf, to_hf_state_dict
from megatron_dwm.model.protocols import ModelChunk

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_INDEX = "model.safetensors.index.json"


def gather_first_layers(
    chunks: Sequence[ModelChunk | torch.nn.Module], model: ModelConfig, *, num_layers: int, vocab_size: int
) -> dict[str, torch.Tensor]:
    """Return the state of a Hugging Face base model with the first ``num_layers`` layers, on every rank.

    Every rank must call it. Parameters must be up to date, which they are not between a step of a distributed
    optimizer with overlapped gathering and the next forward pass.

    Args:
        chunks: this rank's model chunks, wrapped or not.
        vocab_size: embedding rows to keep, usually the vocabulary without its padding.
    """
    state = gather_full_state(chunks, lambda key: not key.startswith("output_layer."), num_layers=num_layers)
    return to_hf_state_dict(state, model, layers=num_layers, vocab_size=vocab_size)


def hf_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the Hugging Face causal language model of ``config``, without storage for its parameters."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    skeleton.tie_weights()
    return skeleton


def hf_tensors(
    model: ModelConfig, prefix: str, vocab_size: int, read: Callable[[Piece], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a Hugging Face causal language model by name, in the order of the layers.

    Args:
        prefix: the prefix of the base model's names.
        vocab_size: embedding rows to keep, usually the vocabulary without its padding.
        read: returns the checkpoint tensor of a piece.
    """
    for piece in pieces(model, range(model.num_layers)):
        for name, tensor in zip(piece.names(model), to_hf(piece, read(piece), vocab_size), strict=True):
            yield name if name.startswith("lm_head.") else f"{prefix}.{name}", tensor


def write_weights(
    folder: Path, skeleton: PreTrainedModel, tensors: Iterator[tuple[str, torch.Tensor]], max_shard_size: str
) -> None:
    """Write a model's tensors as safetensors files, with one file's tensors in memory at a time.

    Args:
        skeleton: the model, without storage.
        tensors: its tensors, by name; they are written in its precision.
        max_shard_size: maximum size of a file, such as ``"5GB"``.

    Raises:
        ValueError: the tensors are not those of the model, or the size is invalid.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    tied = getattr(skeleton, "all_tied_weights_keys", {})
    expected = {name: tensor for name, tensor in skeleton.state_dict().items() if name not in tied}
    split = split_torch_state_dict_into_shards(expected, max_shard_size=max_shard_size)
    remaining = {file: set(names) for file, names in split.filename_to_tensors.items()}
    held: dict[str, dict[str, torch.Tensor]] = {file: {} for file in remaining}
    for name, tensor in tensors:
        file = split.tensor_to_filename[name]
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name} has the shape {list(tensor.shape)} instead of {list(expected[name].shape)}")
        held[file][name] = tensor.to(expected[name].dtype).clone(memory_format=torch.contiguous_format)
        remaining[file].remove(name)
        if not remaining[file]:
            save_file(held.pop(file), folder / file, metadata={"format": "pt"})
    if held:
        raise ValueError(f"the tensor {next(iter(remaining[next(iter(held))]))} is missing")
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
