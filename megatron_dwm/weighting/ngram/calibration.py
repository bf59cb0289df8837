"""Calibration of a linear weighter's scores: a curve from the scores to those that the objective wants.

A linear score says how samples rank. The best score of a sample, in proportion to its expected alignment, is rarely
linear in it: where samples fall into kinds, it changes fast between two kinds and hardly within one. The curve shows
that in the alignments of samples that were scored before the weighter learned from them.

Shape legend: m samples, k samples that the curve is fitted to, p points of the curve.
"""

from __future__ import annotations

import torch

PRIOR_SAMPLES = 150
"""A point of the curve is moved as if so many samples more were found where the linear score puts them."""


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
            errors: what the objective wants their scores to be, less the scores [k], float64.
        """
        groups = scores.argsort(stable=True).tensor_split(len(self.scores))
        means = torch.stack([scores[group].mean() for group in groups])
        moves = torch.stack([errors[group].sum() / (len(group) + PRIOR_SAMPLES) for group in groups])
        self.scores.copy_(means)
        self.calibrated.copy_(means + moves)
