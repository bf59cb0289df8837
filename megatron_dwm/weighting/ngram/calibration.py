"""Calibration of a linear weighter's scores: a curve that maps them to the scores that the objective wants.

The best score of a sample is proportional to its expected alignment. This is rarely linear in the score of a linear
model: where samples are of a few kinds, it changes quickly between the scores of two kinds, and hardly among those of
one. The curve is fitted to samples that were scored before the weighter learned from them.

Shape legend: m samples, k samples that the curve is fitted to, p points of the curve.
"""

from __future__ import annotations

import torch

PRIOR_SAMPLES = 150
"""The curve is shrunk towards the linear scores, as if this many more samples at each point agreed with them.

With 30, weights spread too early in a run (docs/lab-notes.md).
"""


class Calibration(torch.nn.Module):
    """A curve through points, linear between them and constant beyond them; unfitted, it leaves scores unchanged."""

    scores: torch.Tensor
    """Linear scores of the points [p], increasing; all 0 before the first fit."""
    calibrated: torch.Tensor
    """Calibrated scores of the points [p]."""

    def __init__(self, points: int) -> None:
        super().__init__()
        self.register_buffer("scores", torch.zeros(points))
        self.register_buffer("calibrated", torch.zeros(points))

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        """Return calibrated scores, of the shape of ``scores``; the host reads nothing."""
        right = torch.searchsorted(self.scores, scores.detach()).clamp(1, len(self.scores) - 1)
        start, end = self.scores[right - 1], self.scores[right]
        part = ((scores - start) / (end - start).clamp_min(torch.finfo(start.dtype).tiny)).clamp(0, 1)
        curve = torch.lerp(self.calibrated[right - 1], self.calibrated[right], part)
        return torch.where(self.scores[-1] > self.scores[0], curve, scores)

    def fit(self, scores: torch.Tensor, errors: torch.Tensor) -> None:
        """Put the points at the means of equally many samples with neighboring scores.

        Args:
            scores: linear scores of samples that the weighter had not learned from [k], at least p, float64.
            errors: the scores that the objective wants for them, minus the scores [k], float64.
        """
        groups = scores.argsort(stable=True).tensor_split(len(self.scores))
        means = torch.stack([scores[group].mean() for group in groups])
        moves = torch.stack([errors[group].sum() / (len(group) + PRIOR_SAMPLES) for group in groups])
        self.scores.copy_(means, non_blocking=True)
        self.calibrated.copy_(means + moves, non_blocking=True)
