"""Uniform weights: plain training."""

from __future__ import annotations

from typing import Any

from megatron_dwm.data.batch import Batch
from megatron_dwm.weighting.policy import Record, SampleWeights, State, StepOutcome


class UniformWeighting:
    """Plain Megatron training.

    The weighting's state in a checkpoint is kept for the next checkpoint, so that iterations of plain training
    between two bilevel runs do not lose the weighter.
    """

    def __init__(self) -> None:
        self._state: State = {}

    def before_step(self, iteration: int) -> None:
        """Nothing to prepare."""

    def weigh(self, iteration: int, batch: Batch) -> SampleWeights | None:
        """Return None: plain training."""
        return None

    def after_step(
        self, iteration: int, batch: Batch, weights: SampleWeights | None, outcome: StepOutcome
    ) -> list[Record]:
        """Nothing to learn."""
        return []

    def metrics(self, iteration: int, batch: Batch, weights: SampleWeights | None) -> dict[str, Any]:
        """No figures."""
        return {}

    def flops(self, iteration: int, outcome: StepOutcome) -> float:
        """No operations."""
        return 0.0

    def before_save(self, iteration: int) -> None:
        """Nothing to write."""

    def state_dict(self) -> State:
        """Return the state that was loaded, if any."""
        return self._state

    def load_state_dict(self, state: State) -> None:
        """Keep ``state`` for the next checkpoint."""
        self._state = state
