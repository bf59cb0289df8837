"""Running means by hand."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dwm.analysis.running_mean import smoothed, thinned


def test_a_running_mean_looks_back_only():
    assert smoothed([3.0, 1.0, 5.0, 6.0], width=3).tolist() == pytest.approx([3.0, 2.0, 3.0, 4.0])
    assert smoothed([2.0], width=9).tolist() == [2.0] and smoothed([]).tolist() == []
    late = smoothed([0.0] * 20 + [1.0] * 20)
    assert late[:20].tolist() == [0.0] * 20 and late[28:].tolist() == pytest.approx([1.0] * 12)


def test_a_value_that_is_not_finite_reaches_no_further_than_the_width():
    found = smoothed([np.nan, 1.0, 1.0, 1.0], width=2)
    assert np.isnan(found[:2]).all() and found[2:].tolist() == pytest.approx([1.0, 1.0])


def test_a_long_curve_is_thinned_to_means_of_blocks_that_look_back():
    assert thinned([1, 2, 3], [1.0, 2.0, 3.0], 3) == ([1, 2, 3], [1.0, 2.0, 3.0])
    assert thinned(range(1, 8), [0.0, 2.0, 4.0, 6.0, 8.0, 8.0, 9.0], 3) == (
        [3, 6, 7],
        [2.0, pytest.approx(22 / 3), 9.0],
    )
