"""Training of a weighter on the replay by gradient steps, for any architecture.

Shape legend: M samples that a step is made of, c of them on this rank.
"""

from __future__ import annotations

from typing import Protocol

import torch

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.weighting.bilevel.replay import Draw, Replay, sum_over_ranks
from megatron_dwm.weighting.weighter import Weighter
from megatron_dwm.weighting.weights import objective_score_gradient, standardized


class Learner(Protocol):
    """A way to train a weighter on the replay."""

    prior: torch.Tensor | None
    """The state that a checkpoint keeps, if any."""

    @property
    def kept_bytes(self) -> int:
        """Bytes that are kept between updates, in addition to the weighter and the replay."""

    def learn(self, replay: Replay) -> float:
        """Update the weighter; a collective call of all ranks.

        Returns:
            norm of the last gradient.
        """


class GradientLearner:
    """Gradient steps on the objective: the first on the newest batch, the others on samples drawn from the replay."""

    def __init__(self, config: WeightingConfig, weighter: Weighter) -> None:
        self.config, self.weighter = config, weighter
        self.prior: torch.Tensor | None = None
        self.kept_bytes = 0

    def learn(self, replay: Replay) -> float:
        """Take the steps; each uses as many samples as the newest batch has."""
        newest = replay.newest
        draw = Draw(newest.tokens.long(), newest.positions, newest.alignments)
        norm = 0.0
        for step in range(self.config.dwm_weighter_steps):
            if step > 0:
                draw = replay.draw(len(newest.alignments), draw_generator(replay.num_appended, step))
            norm = self._step(draw)
        return norm

    def _step(self, draw: Draw) -> float:
        config, device = self.config, self.weighter.device
        wanted = standardized(draw.alignments, config.dwm_clip_alignment).to(device, non_blocking=True)
        positions = draw.positions.to(device, non_blocking=True)

        def score_gradient(rank_scores: torch.Tensor) -> torch.Tensor:
            scores = sum_over_ranks(rank_scores, positions, len(wanted))
            return objective_score_gradient(wanted, scores, config.dwm_temperature, config.dwm_kl_weight)[positions]

        return self.weighter.step(draw.tokens, score_gradient)


def draw_generator(update: int, step: int) -> torch.Generator:
    """Return the random generator of one step's draw: the same on every rank, and in a resumed run."""
    return torch.Generator().manual_seed((update << 32) + step)
