"""Statistics of measured times."""

from __future__ import annotations

import numpy as np

from megatron_dwm.benchmarks.measuring import median_interval


def test_intervals_of_medians_hold_the_median_as_often_as_they_say() -> None:
    drawn = np.random.default_rng(1).exponential(size=(4000, 15))
    intervals = [median_interval(values) for values in drawn.tolist()]
    # 15 values: P(fewer than 4 below the median) is 0.0176 on either side; the standard error here is 0.003.
    held = np.mean([low <= np.log(2) <= high for low, high in intervals])
    assert abs(held - (1 - 2 * 0.0176)) < 0.012


def test_with_few_values_it_is_their_range() -> None:
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert median_interval([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]) == (1.0, 6.0)
    assert median_interval(list(range(12))) == (2, 9)
