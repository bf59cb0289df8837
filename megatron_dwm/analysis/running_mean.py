"""Running means over past values only: a centered mean would react before the update that causes the change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def smoothed(values: Sequence[float] | np.ndarray, width: int = 9) -> np.ndarray:
    """Return the mean of each value and those before it, ``width`` values at most."""
    if len(values) == 0:
        return np.empty(0)
    totals = np.convolve(values, np.ones(width))[: len(values)]
    means: np.ndarray = totals / np.minimum(np.arange(1, len(values) + 1), width)
    return means


def thinned(iterations: Sequence[int], values: Sequence[float], max_points: int) -> tuple[list[int], list[float]]:
    """Return a curve of at most ``max_points`` points: means of equal blocks, each at the block's last iteration."""
    size = -(-len(iterations) // max_points)
    if size <= 1:
        return list(iterations), [float(value) for value in values]
    ends = [*range(size, len(iterations), size), len(iterations)]
    starts = [0, *ends[:-1]]
    array = np.asarray(values, dtype=float)
    means = [float(array[start:end].mean()) for start, end in zip(starts, ends, strict=True)]
    return [iterations[end - 1] for end in ends], means
