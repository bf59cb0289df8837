"""When the weighter starts, learns and is exported.

Iterations count from 1. The warm-up trains with uniform weights. Then follow stages of equal length (the last one
includes what is left over). The weighter is trained in the first iterations of each stage, its update window, and is
frozen in the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.errors import UserError

DEFAULT_UPDATE_INTERVAL = 100
"""Interval in a long run: an update costs about as much as a step, so weighting adds about 1 % (docs/scaling.md)."""
DEFAULT_UPDATES = 80
"""Outer updates of a short run: enough that a weighter distinguishes samples whose single alignments hardly differ
(docs/lab-notes.md)."""


@dataclass(frozen=True)
class StageSchedule:
    """The stages of a run."""

    train_iters: int
    warmup_iters: int
    num_stages: int
    stage_iters: int
    update_iters: int
    update_interval: int

    def stage(self, iteration: int) -> int:
        """Return 0 in the warm-up, then 1 … ``num_stages``."""
        if iteration <= self.warmup_iters:
            return 0
        return min(1 + (iteration - self.warmup_iters - 1) // self.stage_iters, self.num_stages)

    def is_weighted(self, iteration: int) -> bool:
        """Return whether this iteration's samples are weighted by the weighter."""
        return iteration > self.warmup_iters

    def is_update(self, iteration: int) -> bool:
        """Return whether an outer update follows this iteration's step."""
        if not self.is_weighted(iteration):
            return False
        place = iteration - self.warmup_iters - (self.stage(iteration) - 1) * self.stage_iters
        return place <= self.update_iters and place % self.update_interval == 0

    def is_stage_end(self, iteration: int) -> bool:
        """Return whether this is a stage's last iteration (the warm-up is none)."""
        ends_run = iteration == self.train_iters
        return self.is_weighted(iteration) and (ends_run or self.stage(iteration) != self.stage(iteration + 1))


def bilevel_stages(config: WeightingConfig, train_iters: int, weighter_resumed_at: int | None = None) -> StageSchedule:
    """Return the stages that the flags specify.

    Args:
        weighter_resumed_at: the iteration from which a run continues with a trained weighter, if it does. The default
            warm-up, which depends on the run's length, is then over even if the length has changed.

    Raises:
        UserError: there is no room for the stages, or an update window contains no update.
    """
    stages = config.dwm_num_stages
    warmup = config.dwm_warmup_iters
    if warmup is None:
        # A copy of the language model is useful only after it has learned something.
        warmup = train_iters // (stages + 1) if config.dwm_init_from == "lm" else 0
        warmup = warmup if weighter_resumed_at is None else min(warmup, weighter_resumed_at)
    stage_iters = (train_iters - warmup) // stages
    if stage_iters < 1:
        raise UserError(
            f"--train-iters {train_iters} leaves no iterations for --dwm-num-stages {stages} after "
            f"--dwm-warmup-iters {warmup}; train longer or lower one of them"
        )
    window = config.dwm_stage_update_iters or train_iters
    by_length = max(1, (train_iters - warmup) // DEFAULT_UPDATES)
    interval = config.dwm_update_interval or min(DEFAULT_UPDATE_INTERVAL, by_length, window, stage_iters)
    if interval > min(window, stage_iters):
        raise UserError(
            f"--dwm-update-interval {interval} exceeds the update window of {min(window, stage_iters)} iterations, "
            "so that the weighter would never be updated; lower it, or raise --dwm-stage-update-iters or --train-iters"
        )
    return StageSchedule(train_iters, warmup, stages, stage_iters, window, interval)


def frozen_stages(config: WeightingConfig, train_iters: int) -> StageSchedule:
    """Return one stage without updates, from the first iteration unless a warm-up is asked for.

    Raises:
        UserError: no iteration is weighted.
    """
    warmup = config.dwm_warmup_iters or 0
    if warmup >= train_iters and warmup > 0 and config.dwm_mode != "off":
        raise UserError(
            f"--dwm-warmup-iters {warmup} leaves no iteration of --train-iters {train_iters} for --dwm-mode "
            f"{config.dwm_mode}; lower it"
        )
    return StageSchedule(train_iters, warmup, 1, max(train_iters - warmup, 1), 0, 1)
