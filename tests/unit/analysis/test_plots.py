"""Names from data as they are, whatever characters they hold."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from megatron_dwm.analysis.plots import draw_by_source, legend_text, png
from tests.unit.analysis.made_records import run_of


@pytest.mark.parametrize("name", ["$a^{b$", "_hidden", "half \udc80 of a pair", "a_b", "x $ y"])
def test_a_name_is_drawn_and_stands_in_the_legend(name: str):
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1.0], label=legend_text(name))
    legend = axes.legend()
    assert [text.get_text().replace("\\$", "$").strip() for text in legend.get_texts()] == [name.replace("\udc80", "?")]
    assert png(figure).startswith(b"\x89PNG")


def test_many_sources_and_long_names_leave_room_for_the_lines():
    """And lines whose colors repeat differ."""
    names = ["x" * 120, *(f"source{number}" for number in range(11))]
    run = run_of([], share_by_source=dict.fromkeys(names, 1.0), weight_by_source=dict.fromkeys(names, 1.0))
    figure = Figure(figsize=(9, 7))
    axes = figure.subplots()
    draw_by_source(axes, run, "weight_by_source", "mean weight")
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 12
    figure.canvas.draw()
    assert axes.get_legend().get_window_extent().width < axes.get_window_extent().width
