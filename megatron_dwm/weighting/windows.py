"""Windows of token ids, for classifiers that read only a limited number at once.

Training and ``megatron-dwm score`` cut and pad in the same way, so that they give the same scores. Megatron is not
needed here.

Shape legend: b windows of a batch, t tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

UNLIMITED_LENGTH = 10**9
"""Tokenizers without a maximum length report a larger one."""
_CHANGING_WITH_LENGTH = ("dynamic", "longrope")
"""rope_types with other frequencies in batches with longer texts."""
_PROBES = ("0", "a", "the")
"""Texts to probe a tokenizer with; the first one also works for tokenizers of numbers."""


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens that a tokenizer puts around a text."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> SpecialTokens:
        """Find the special tokens of a Hugging Face tokenizer."""
        whole: list[int] = []
        for probe in _PROBES:
            plain = tokenizer(probe, add_special_tokens=False)["input_ids"]
            whole = tokenizer(probe)["input_ids"]
            for start in range(len(whole) - len(plain) + 1):
                if plain and whole[start : start + len(plain)] == plain:
                    return cls(tuple(whole[:start]), tuple(whole[start + len(plain) :]))
        return cls(tuple(whole), ())

    def __len__(self) -> int:
        return len(self.before) + len(self.after)


class Window(NamedTuple):
    """A part of a text that is scored as a whole."""

    ids: Sequence[int]
    """Token ids, including special tokens."""
    size: int
    """The number of tokens of the text in it, its weight in a mean over windows."""


def cut(ids: Sequence[int], length: int | None, special: SpecialTokens) -> list[Window]:
    """Cut a text's token ids into windows, each between the special tokens.

    Args:
        ids: token ids of the text, without special tokens.
        length: maximum length of a window, including special tokens; None for a single window.
        special: the special tokens around each window.
    """
    room = max(len(ids), 1) if length is None else max(length - len(special), 1)
    starts = range(0, max(len(ids), 1), room)
    parts = [ids[start : start + room] for start in starts]
    return [Window((*special.before, *part, *special.after), max(len(part), 1)) for part in parts]


def pad_windows(windows: Sequence[Window], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of windows, padded at their ends, and a mask that is 0 for padding, both [b, t]."""
    width = max([1, *(len(window.ids) for window in windows)])
    tokens = [[*window.ids, *[pad] * (width - len(window.ids))] for window in windows]
    # In a window without tokens the first padding token is read, because an empty window has no score.
    mask = [[1] * max(len(window.ids), 1) + [0] * (width - max(len(window.ids), 1)) for window in windows]
    shape = len(windows), width
    return (
        torch.tensor(tokens, dtype=torch.int64, device=device).view(shape),
        torch.tensor(mask, dtype=torch.int64, device=device).view(shape),
    )


def position_limit(model: Any) -> int | None:
    """Return the number of tokens that a classifier can read at once; None if it is not limited.

    It is not limited with rotary positions, or without positions. Rotary positions that change with the length of the
    longest text in a batch are limited to the length up to which they do not, as a score must not depend on the others.
    """
    config = model.config
    positions: Any = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None)
    if rope and rope.get("rope_type") in _CHANGING_WITH_LENGTH:
        return int(rope.get("original_max_position_embeddings") or positions)
    if positions is None or positions < 1 or rope or getattr(config, "rope_theta", None):  # XLNet has -1
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # RoBERTa-like models count positions from after the padding position.
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - unused
    return int(positions)
