"""Intervals against values computed by hand, tables and repeated experiments."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dwm.analysis.preference import rank_correlation
from megatron_dwm.analysis.uncertainty import mean_correlation, mean_over_updates, student_t


def test_students_t_is_that_of_the_tables():
    table = {4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 30: 2.042, 1000: 1.962}
    for degrees, value in table.items():
        assert student_t(degrees) == pytest.approx(value, rel=5e-3)


def test_a_mean_over_updates_has_students_interval():
    found = mean_over_updates([1.0, 2.0, 3.0, 4.0, 5.0], [2] * 5)
    half = 2.776 * np.sqrt(2.5) / np.sqrt(5)
    assert (found.value, found.n, found.unit) == (3.0, 5, "updates")
    assert (found.low, found.high) == pytest.approx((3.0 - half, 3.0 + half), rel=1e-2)
    assert mean_over_updates([1.0, 4.0], [1, 3]).value == 3.25  # updates count by their samples


def test_too_few_updates_have_no_interval_and_none_have_no_value():
    few = mean_over_updates([1.0, 2.0, 3.0, 4.0], [1] * 4)
    assert few.value == 2.5 and few.low is None and not few.is_known and not few.excludes_zero
    assert mean_over_updates([], []).value is None
    assert mean_correlation([0.5], [100], updates=4).low is None and mean_correlation([], [], updates=9).value is None


def test_the_interval_of_a_correlation_holds_it_in_95_of_100_experiments():
    # Of 400 experiments 95 % +- 1.1 % (one standard error) hold the true value: 6 / pi asin(0.5 / 2) for normal pairs.
    generator = np.random.default_rng(7)
    truth, held = 6 / np.pi * np.arcsin(0.5 / 2), 0
    for _ in range(400):
        first = generator.normal(size=60)
        second = 0.5 * first + np.sqrt(0.75) * generator.normal(size=60)
        rho = rank_correlation(first, second)
        assert rho is not None
        found = mean_correlation([rho], [60], updates=9)
        held += found.low <= truth <= found.high
    assert 0.91 < held / 400 < 0.985
