"""Uniform weights until the warm-up is over, then another weighting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_dwm.data.batch import Batch
from megatron_dwm.weighting.policy import Record, SampleWeighting, SampleWeights, State, StepOutcome
from megatron_dwm.weighting.stage_schedule import StageSchedule
from megatron_dwm.weighting.uniform import UniformWeighting
from megatron_dwm.weighting.weight_metrics import WeightMetrics

Start = Callable[[int, State], SampleWeighting]
"""Builds the weighting at an iteration from the state of a checkpoint (may be empty); a collective call."""

NOT_STARTED: State = {
    "consumed_target_samples": 0,
    "outer_updates": 0,
    "weighter_config": None,
    "weighter": None,
    "weighter_optimizer": None,
    "replay": [],
}
"""State before the first weighted iteration, under the names of all checkpoints so far."""


class WarmupWeighting:
    """Uniform weights in the warm-up; before the first weighted iteration the following weighting is built.

    A weighting that starts late can be initialized from what the language model has learned by then.
    """

    def __init__(self, stages: StageSchedule, weight_metrics: WeightMetrics, start: Start) -> None:
        self.stages, self.weight_metrics, self._start = stages, weight_metrics, start
        self._state: State = {}
        self._current: SampleWeighting = UniformWeighting()
        self._has_started = False

    @property
    def current(self) -> SampleWeighting:
        """The weighting in use."""
        return self._current

    def before_step(self, iteration: int) -> None:
        """Build the weighting at the end of the warm-up."""
        if not self._has_started and self.stages.is_weighted(iteration):
            self._current = self._start(iteration, self._state)
            self._has_started, self._state = True, {}
        self._current.before_step(iteration)

    def weigh(self, iteration: int, batch: Batch) -> SampleWeights | None:
        """Return the current weighting's weights."""
        return self._current.weigh(iteration, batch)

    def after_step(
        self, iteration: int, batch: Batch, weights: SampleWeights | None, outcome: StepOutcome
    ) -> list[Record]:
        """Pass the step to the current weighting, which learns from it."""
        return self._current.after_step(iteration, batch, weights, outcome)

    def metrics(self, iteration: int, batch: Batch, weights: SampleWeights | None) -> dict[str, Any]:
        """Return the metrics of the step's weights; those of uniform weights in the warm-up."""
        if self._has_started:
            return self._current.metrics(iteration, batch, weights)
        return self.weight_metrics(iteration, batch, weights)

    def flops(self, iteration: int, outcome: StepOutcome) -> float:
        """Return the current weighting's operations."""
        return self._current.flops(iteration, outcome)

    def before_save(self, iteration: int) -> None:
        """Write the current weighting's files."""
        self._current.before_save(iteration)

    def state_dict(self) -> State:
        """Return the current weighting's state; during the warm-up, the state that the weighting will start from."""
        if self._has_started:
            return self._current.state_dict()
        return self._state or NOT_STARTED

    def load_state_dict(self, state: State) -> None:
        """Keep ``state`` for the start of the weighting."""
        self._state = state
