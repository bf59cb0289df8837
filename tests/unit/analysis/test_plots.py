"""Running means by hand; names from data as they are, whatever characters they hold."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_dwm.analysis.plots import legend_text, png, smoothed


def test_a_running_mean_looks_back_only():
    assert smoothed([3.0, 1.0, 5.0, 6.0], width=3).tolist() == pytest.approx([3.0, 2.0, 3.0, 4.0])
    assert smoothed([2.0], width=9).tolist() == [2.0] and smoothed([]).tolist() == []
    late = smoothed([0.0] * 20 + [1.0] * 20)
    assert late[:20].tolist() == [0.0] * 20 and late[28:].tolist() == pytest.approx([1.0] * 12)


def test_a_value_that_is_not_finite_reaches_no_further_than_the_width():
    found = smoothed([np.nan, 1.0, 1.0, 1.0], width=2)
    assert np.isnan(found[:2]).all() and found[2:].tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("name", ["$a^{b$", "_hidden", "half \udc80 of a pair", "a_b", "x $ y"])
def test_a_name_is_drawn_and_stands_in_the_legend(name: str):
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1.0], label=legend_text(name))
    legend = axes.legend()
    assert [text.get_text().replace("\\$", "$").strip() for text in legend.get_texts()] == [name.replace("\udc80", "?")]
    assert png(figure).startswith(b"\x89PNG")
