"""The language model as a Hugging Face model, whole or its first layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.errors import UserError
from megatron_dwm.model.full_state import gather_full_state
from megatron_dwm.model.hf_config import hf_config
from megatron_dwm.model.hf_weights import to_hf_state_dict

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def gather_first_layers(
    chunks: Sequence[Any], model: ModelConfig, *, num_layers: int, vocab_size: int
) -> dict[str, torch.Tensor]:
    """The first layers as the state of a LlamaModel or GPT2Model with ``num_layers`` layers, on every rank.

    Every rank must call it. Parameters must be up to date, which they are not between a step of a distributed
    optimizer with overlapped gathering and the next forward pass.

    Args:
        chunks: this rank's model chunks, wrapped or not.
        vocab_size: embedding rows to keep, usually the vocabulary without its padding.
    """
    state = gather_full_state(chunks, lambda key: not key.startswith("output_layer."), num_layers=num_layers)
    return to_hf_state_dict(state, model, layers=num_layers, vocab_size=vocab_size)


def causal_language_model(
    full_state: Mapping[str, torch.Tensor], model: ModelConfig, *, vocab_size: int
) -> PreTrainedModel:
    """The LlamaForCausalLM or GPT2LMHeadModel of a full state, in its precision.

    Args:
        full_state: checkpoint key to unsharded tensor, as :func:`gather_full_state` returns it.
        vocab_size: embedding rows to keep, usually the vocabulary without its padding.

    Raises:
        UserError: the architecture is neither's, or the state is not this model's.
    """
    from transformers import AutoModelForCausalLM

    try:
        state = to_hf_state_dict(full_state, model, layers=model.layers, vocab_size=vocab_size)
    except (KeyError, IndexError) as error:
        raise UserError(f"the checkpoint does not hold the model that its arguments describe: {error}") from error
    with torch.device("meta"):
        language_model: PreTrainedModel = AutoModelForCausalLM.from_config(
            hf_config(model, vocab_size=vocab_size, num_layers=model.layers),
            dtype=full_state["embedding.word_embeddings.weight"].dtype,
        )
    head = state.pop("lm_head.weight", None)
    language_model.base_model.load_state_dict(state, strict=True, assign=True)
    if head is not None:
        language_model.lm_head.load_state_dict({"weight": head}, strict=True, assign=True)
    language_model.tie_weights()
    return language_model
