"""The parts of a megatron-core optimizer."""

from __future__ import annotations

from typing import Any

from megatron_dwm.model.protocols import Optimizer


def optimizer_parts(optimizer: Optimizer) -> list[Any]:
    """Return the optimizers of a ``ChainedOptimizer``, or the optimizer itself.

    Each part has torch's optimizer in ``optimizer`` and its settings in ``config``.
    """
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def has_loss_scale(optimizer: Optimizer) -> bool:
    """Return whether the optimizer may scale the loss; if not, its loss scale is always 1."""
    from megatron.core.optimizer.optimizer import FP32Optimizer

    parts = [part for part in optimizer_parts(optimizer) if not isinstance(part, FP32Optimizer)]
    return any(getattr(part, "grad_scaler", part) is not None for part in parts)
