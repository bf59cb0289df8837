"""Confidence intervals of figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

MIN_UPDATES = 5
"""Minimum number of outer updates for an interval; with fewer, Student's t makes it too wide to be useful."""
_NORMAL = 1.959964
"""Of the normal distribution, two-sided 95 %."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float | None
    """None if there are no values to compute it from."""
    low: float | None
    high: float | None
    """The interval; None if there are too few updates."""
    n: int
    unit: Literal["updates", "samples"]
    """The unit of ``n``."""

    @property
    def is_known(self) -> bool:
        """Whether there is a value with an interval."""
        return self.value is not None and self.low is not None

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval is on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_over_updates(values: Sequence[float], counts: Sequence[float], comparisons: int = 1) -> Estimate:
    """Return the mean of one value per update, with Student's interval over the updates.

    Updates are the unit because the samples of one are weighted by the same weighter and aligned with the same target.

    Args:
        values: one of each update.
        counts: how many samples each value is of; updates count by them.
        comparisons: number of intervals that all hold together in 95 % of cases (Bonferroni).
    """
    n = len(values)
    if n == 0:
        return Estimate(None, None, None, 0, "updates")
    fractions = np.asarray(counts, dtype=float) / np.sum(counts)
    mean = float(fractions @ np.asarray(values, dtype=float))
    if n < MIN_UPDATES:
        return Estimate(mean, None, None, n, "updates")
    deviations = fractions * (np.asarray(values, dtype=float) - mean)
    half = student_t(n - 1, comparisons) * float(np.sqrt((deviations**2).sum() * n / (n - 1)))
    return Estimate(mean, mean - half, mean + half, n, "updates")


def mean_correlation(rhos: Sequence[float], sizes: Sequence[int], updates: int) -> Estimate:
    """Return the mean of rank correlations of groups of samples, with the interval of Bonett and Wright (2000).

    Args:
        rhos: Spearman's ρ of each group.
        sizes: samples of each group, more than 3; groups count by them.
        updates: outer updates that the samples are from.
    """
    n = int(np.sum(sizes)) if len(sizes) else 0
    if not rhos:
        return Estimate(None, None, None, n, "samples")
    rho, size = np.asarray(rhos, dtype=float), np.asarray(sizes, dtype=float)
    fractions = size / size.sum()
    mean = float(fractions @ rho)
    if updates < MIN_UPDATES:
        return Estimate(mean, None, None, n, "samples")
    # The variance of Fisher's z, brought back to ρ by the slope of tanh.
    variances = (1 + rho**2 / 2) / (size - 3) * (1 - rho**2) ** 2
    half = _NORMAL * float(np.sqrt((fractions**2 * variances).sum()))
    return Estimate(mean, max(-1.0, mean - half), min(1.0, mean + half), n, "samples")


def student_t(degrees: int, comparisons: int = 1) -> float:
    """Return Student's t, two-sided 95 %, by the expansion of Cornish and Fisher.

    From 4 degrees of freedom on, its error is half a percent for one comparison, and a tenth for 100.
    """
    z = NormalDist().inv_cdf(1 - 0.025 / comparisons)
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )
