"""Names from data as they are, whatever characters they hold."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from megatron_dwm.analysis.plots import legend_text, png


@pytest.mark.parametrize("name", ["$a^{b$", "_hidden", "half \udc80 of a pair", "a_b", "x $ y"])
def test_a_name_is_drawn_and_stands_in_the_legend(name: str):
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1.0], label=legend_text(name))
    legend = axes.legend()
    assert [text.get_text().replace("\\$", "$").strip() for text in legend.get_texts()] == [name.replace("\udc80", "?")]
    assert png(figure).startswith(b"\x89PNG")
