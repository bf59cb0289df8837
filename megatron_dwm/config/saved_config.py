"""The configuration of a run that has saved a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_dwm.config.checkpoint_args import effective_arguments
from megatron_dwm.config.flags import build
from megatron_dwm.config.run import PARTS, RunConfig


def saved_config(saved: Mapping[str, Any], *, resumed_at: tuple[int, int] = (0, 0)) -> RunConfig:
    """Return the configuration of the run of this program that saved a checkpoint.

    Args:
        saved: the checkpoint's arguments.
        resumed_at: as :attr:`RunConfig.resumed_at`.

    Raises:
        UserError: its arguments are not such a run's.
    """
    known = effective_arguments(saved)
    if known.get("train_samples"):
        known["train_iters"] = None  # it follows from the samples, and is saved too, for Megatron-LM
    parts: dict[str, Any] = {name: build(part, known) for name, part in PARTS.items()}
    return RunConfig(world_size=int(saved.get("world_size", 1)), **parts, resumed_at=resumed_at)
