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
        """Do nothing."""

    def weigh(self, iteration: int, batch: Batch) -> SampleWeights | None:
        """Return None: plain training."""
        return None

    def after_step(
        self, iteration: int, batch: Batch, weights: SampleWeights | None, outcome: StepOutcome
    ) -> list[Record]:
        """Return no records."""
        return []

    def metrics(self, iteration: int, batch: Batch, weights: SampleWeights | None) -> dict[str, Any]:
        """Return no metrics."""
        return {}

    def flops(self, iteration: int, outcome: StepOutcome) -> float:
        """Return 0: nothing is added to plain training."""
        return 0.0

    def before_save(self, iteration: int) -> None:
        """Write nothing."""

    def state_dict(self) -> State:
        """Return the state that was loaded, if any."""
        return self._state

    def load_state_dict(self, state: State) -> None:
        """Keep ``state`` for the next checkpoint."""
        self._state = state
