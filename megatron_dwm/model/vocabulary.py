"""Rows of the embedding and the output layer, and which of them take part in the softmax.

The vocabulary is padded so that tensor-parallel ranks divide it, and matrix products are of round sizes. In a model
that starts from scratch the padding takes part in the softmax, as in Megatron-LM: the model learns that it never comes.
Rows that a model was not trained with must not: their logits of 0 would enter the sum. That concerns models imported
from Hugging Face, whose vocabulary is padded here; their checkpoints say how many rows count.

Shape legend: b samples of a microbatch, s sequence length, v this rank's rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.utils import VocabUtility
from torch.utils.hooks import RemovableHandle

from megatron_dwm.errors import UserError

SOFTMAX_SIZE = "dwm_softmax_vocab_size"
"""Name of :attr:`Vocabulary.tokens` among the arguments of an imported model's checkpoint."""


@dataclass(frozen=True)
class Vocabulary:
    """Size of a model's vocabulary."""

    rows: int
    """Rows of the embedding and of the output layer, including padding."""
    tokens: int | None = None
    """Tokens of an imported model, which may be more than its tokenizer has; None in a model from scratch."""

    @property
    def softmax_size(self) -> int:
        """The number of first rows that take part in the softmax."""
        return self.rows if self.tokens is None else self.tokens

    @property
    def arguments(self) -> dict[str, int]:
        """The arguments that a checkpoint must contain for it."""
        return {} if self.tokens is None else {SOFTMAX_SIZE: self.tokens}

    def require_tokens(self, tokens: int) -> None:
        """Refuse a tokenizer with tokens that take no part in the softmax.

        Raises:
            UserError: it has more than ``softmax_size`` tokens.
        """
        if tokens > self.softmax_size:
            raise UserError(
                f"--load: the checkpoint's model has {self.softmax_size} tokens and the tokenizer {tokens}; give the "
                "flags of the tokenizer that it was trained with"
            )


def saved_tokens(arguments: Mapping[str, Any]) -> int | None:
    """Return the tokens of a checkpoint's model if it was imported.

    Args:
        arguments: the checkpoint's arguments. Earlier versions imported models with ``hf_vocab_size``.
    """
    found = arguments.get(SOFTMAX_SIZE) or arguments.get("hf_vocab_size")
    return None if found is None else int(found)


def mask_vocabulary_padding(
    output_layer: torch.nn.Module, softmax_size: int, tp_rank: int, tp_size: int
) -> RemovableHandle | None:
    """Exclude the rows from ``softmax_size`` on from the softmax of ``output_layer``'s logits.

    Their logits are set to the lowest number, whose exponential is exactly 0 in every precision; so is their gradient.

    Args:
        output_layer: a ColumnParallelLinear of logits [s, b, v] that stay split over the tensor-parallel ranks.

    Returns:
        the handle that removes the mask; None if this rank has no such rows.
    """
    partition: int = output_layer.output_size_per_partition  # type: ignore[assignment]
    first, _ = VocabUtility.vocab_range_from_per_partition_vocab_size(partition, tp_rank, tp_size)
    if first + partition <= softmax_size:
        return None

    def mask(_module: Any, _inputs: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        logits, bias = output
        is_padding = torch.arange(first, first + partition, device=logits.device) >= softmax_size
        return logits.masked_fill(is_padding, torch.finfo(logits.dtype).min), bias

    return output_layer.register_forward_hook(mask)
