"""Building blocks of the page's figures in plotly: axes, lines, shaded stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from megatron_dwm.analysis.records import RunRecords
from megatron_dwm.analysis.report.palette import FAINT, GRID, INK, PAPER, faded
from megatron_dwm.analysis.running_mean import thinned

MAX_POINTS = 1500
"""Points of a line; a longer one is drawn by means of equal blocks."""
_MAX_NAME_LENGTH = 32


def label(name: str) -> str:
    """Return a name from the data, escaped so that plotly shows it literally; a long one is shortened."""
    # Half of a surrogate pair is in no JSON that a browser reads.
    whole = name.encode("utf-8", "replace").decode()
    half = _MAX_NAME_LENGTH // 2
    return escape(whole if len(whole) <= _MAX_NAME_LENGTH else f"{whole[:half]}…{whole[-half:]}", quote=False)


def line(
    iterations: Sequence[int], values: Sequence[float] | np.ndarray, name: str, color: str, **options: Any
) -> go.Scatter:
    """Return a line over iterations.

    Args:
        iterations: iterations of the points.
        values: values of the points.
        name: from the data or our own; shown literally.
        color: one of the palette.
        options: further options of plotly's scatter trace.
    """
    x, y = thinned(iterations, [float(value) for value in values], MAX_POINTS)
    style = {"color": color, "width": 2, **options.pop("line", {})}
    return go.Scatter(
        x=x,
        y=rounded(y),
        name=label(name),
        line=style,
        **{"mode": "lines", "hovertemplate": "%{y:.3f}", **options},
    )


def faint_line(iterations: Sequence[int], values: Sequence[float] | np.ndarray, color: str = FAINT) -> go.Scatter:
    """Return the line behind a running mean: the values themselves, without a label."""
    thin = {"width": 1, "color": faded(color, 0.45)}
    return line(iterations, values, "", color, line=thin, hoverinfo="skip", hovertemplate=None, showlegend=False)


def rounded(values: Iterable[float]) -> list[float | None]:
    """Return values to 5 digits, which keeps the page small; None for those that are not finite."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values]


def figure(traces: Sequence[Any], run: RunRecords | None = None, *, height: int = 320, **layout: Any) -> go.Figure:
    """Return a figure over iterations.

    Args:
        traces: its lines.
        run: whose stages are shaded, if given.
        height: height in pixels; the width is the page's.
        layout: plotly's layout options, in addition to those that all figures of the page share.
    """
    axis = {
        "gridcolor": GRID,
        "linecolor": FAINT,
        "zerolinecolor": FAINT,
        "zeroline": False,
        "automargin": True,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": FAINT,
    }
    shared: dict[str, Any] = {
        "template": "none",
        "height": height,
        "margin": {"l": 44, "r": 10, "t": 14, "b": 44, "pad": 0},
        "font": {"family": "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", "size": 13, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": PAPER, "bordercolor": FAINT, "font": {"color": INK}},
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1.02,
            "yanchor": "bottom",
            "traceorder": "normal",
            "font": {"size": 12},
        },
        "dragmode": "zoom",
        "showlegend": len([trace for trace in traces if trace.showlegend is not False]) > 1,
    }
    # Figures of one run have their iterations one under the other.
    whole = {"range": [run.steps[0]["iteration"], run.steps[-1]["iteration"]]} if run is not None else {}
    axes = {
        "xaxis": {**axis, **whole, "title": axis_title("iteration"), **layout.pop("xaxis", {})},
        "yaxis": {**axis, **layout.pop("yaxis", {})},
    }
    shapes = [*layout.pop("shapes", ()), *(_shaded_stages(run) if run is not None else ())]
    return go.Figure(list(traces), {**shared, **axes, "shapes": shapes, **layout})


def axis_title(text: str) -> dict[str, Any]:
    """Return the title of a horizontal axis."""
    return {"text": text, "standoff": 6, "font": {"size": 13}}


def mark(value: float) -> dict[str, Any]:
    """Return a dashed line across a figure, such as that of weight 1."""
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": value,
        "y1": value,
        "line": {"color": FAINT, "width": 1, "dash": "dash"},
        "layer": "below",
    }


def note(text: str) -> dict[str, Any]:
    """Return the layout of a figure without enough data, with a note that says so."""
    words = {"text": text, "showarrow": False, "xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5}
    return {"annotations": [{**words, "font": {"size": 14, "color": INK}}]}


def _shaded_stages(run: RunRecords) -> list[dict[str, Any]]:
    """Return a rectangle for every other stage; the warm-up, stage 0, stays white."""
    return [
        {
            "type": "rect",
            "xref": "x",
            "yref": "paper",
            "x0": span.start,
            "x1": span.end,
            "y0": 0,
            "y1": 1,
            "fillcolor": faded(FAINT, 0.13),
            "line": {"width": 0},
            "layer": "below",
        }
        for span in run.stage_spans
        if span.stage % 2
    ]
