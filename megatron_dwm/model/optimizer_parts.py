"""The parts of a megatron-core optimizer."""

from __future__ import annotations

from typing import Any

from megatron_dwm.model.protocols import Optimizer


def optimizer_parts(optimizer: Optimizer) -> list[Any]:
    """Return the optimizers of a ``ChainedOptimizer``, or the optimizer itself.

    Each part has torch's optimizer in ``optimizer`` and its settings in ``config``.
    """
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))
