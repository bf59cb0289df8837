"""Checks of a weighter's state in a checkpoint: a damaged or changed one is named, and not loaded in part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_dwm.errors import shortened
from megatron_dwm.weighting.policy import State

_NEEDED: dict[str, type] = {
    "consumed_target_samples": int,
    "outer_updates": int,
    "weighter_config": str,
    "weighter_optimizer": dict,
    "replay": list,
}
"""Entries that must be there besides the weighter's parameters, and their types."""
_OPTIONAL: dict[str, type] = {
    "weighter_tokenizer": str,
    "weighter_tokenizer_digest": str,
    "weighter_prior": torch.Tensor,
    "target_gradients": float,
    "source_offsets": dict,
}
"""Entries that not every weighter has, or not every earlier version saved."""


def check_weighter_state(state: State) -> None:
    """Check that all entries of a weighter's state are there and have their types; a state without one is not checked.

    Raises:
        ValueError: one is missing, or has another type.
    """
    weighter = state.get("weighter")
    if weighter is None and state.get("weighter_config") is None:
        return
    if not isinstance(weighter, Mapping) or not all(isinstance(value, torch.Tensor) for value in weighter.values()):
        raise ValueError(f"its parameters are {shortened(weighter, 40)}")
    for name, kind in _NEEDED.items():
        value = state.get(name)
        if not isinstance(value, kind) or (isinstance(value, int) and value < 0):
            raise ValueError(f"its {name} is {shortened(value, 40)}")
    for name, kind in _OPTIONAL.items():
        if not isinstance(value := state.get(name), kind | None):
            raise ValueError(f"its {name} is {shortened(value, 40)}")
    for name, sums in (state.get("source_offsets") or {}).items():
        if not isinstance(sums, list) or len(sums) != 2 or not all(isinstance(value, float) for value in sums):
            raise ValueError(f"its offset of the source {name} is {shortened(sums, 40)}")
    for entry in state["replay"]:
        if not _is_aligned_batch(entry):
            raise ValueError(f"a batch of its replay is {shortened(entry, 40)}")


def _is_aligned_batch(entry: Any) -> bool:
    if not isinstance(entry, Mapping):
        return False
    tokens, alignments = entry.get("tokens"), entry.get("alignments")
    if not (isinstance(tokens, torch.Tensor) and isinstance(alignments, torch.Tensor)):
        return False
    return tokens.ndim == 2 and not tokens.is_floating_point() and alignments.shape == tokens.shape[:1]
