"""The figures of one run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from megatron_dwm.analysis.preference import (
    Correlations,
    QuartileGroup,
    SourceAlignments,
    weight_quantiles,
)
from megatron_dwm.analysis.records import RunRecords
from megatron_dwm.analysis.report.documents import WeightHistory
from megatron_dwm.analysis.report.drawing import axis_title, faint_line, figure, label, line, mark, note, rounded
from megatron_dwm.analysis.report.palette import COLORS, FAINT, INK, color, dash, faded, stage_color
from megatron_dwm.analysis.running_mean import smoothed
from megatron_dwm.analysis.uncertainty import MIN_UPDATES, Estimate

TOO_FEW = "too few updates"
_MEAN_OF_UPDATES = 5


def losses(run: RunRecords) -> go.Figure:
    """Draw training, evaluation and target losses over iterations."""
    iterations, values = run.step_series("lm_loss")
    traces = [
        faint_line(iterations, values),
        line(iterations, smoothed(values), "training (unweighted)", INK),
    ]
    target = [update for update in run.updates if update["target_loss"] is not None]
    if target:
        at, losses_there = [u["iteration"] for u in target], [u["target_loss"] for u in target]
        traces.append(line(at, losses_there, "target batches", COLORS[3], mode="markers", marker={"size": 4}))
    for number, (name, curve) in enumerate(run.evaluation_curves.items()):
        shade, dashes = color((0, 2, 1, 4, 5, 6, 7)[number % 7]), {"dash": dash(number, 7)}
        traces.append(line(*curve, name, shade, mode="lines+markers", marker={"size": 6}, line=dashes))
    return figure(traces, run)


def weight_spread(run: RunRecords) -> go.Figure:
    """Draw quantiles of the weights at each outer update."""
    iterations = [update["iteration"] for update in run.updates]
    if len(iterations) < 2:
        return figure([], run, shapes=[mark(1.0)], **note(TOO_FEW))
    low, lower, middle, upper, high = np.array([weight_quantiles(update) for update in run.updates]).T
    invisible = {"line": {"width": 0}, "showlegend": False, "hoverinfo": "skip", "hovertemplate": None}

    def band(bottom: np.ndarray, top: np.ndarray, name: str, opacity: float) -> list[go.Scatter]:
        between = {"line": {"width": 0}, "fill": "tonexty", "fillcolor": faded(COLORS[0], opacity)}
        return [
            line(iterations, bottom, "", COLORS[0], **invisible),
            line(iterations, top, name, COLORS[0], **between, hovertemplate="up to %{y:.2f}"),
        ]

    traces = [
        *band(low, high, "90 % of samples", 0.2),
        *band(lower, upper, "middle half", 0.35),
        line(iterations, middle, "median", COLORS[0]),
    ]
    return figure(traces, run, shapes=[mark(1.0)])


def effective_sample_size(run: RunRecords) -> go.Figure:
    """Draw the effective sample size over iterations."""
    iterations, values = run.step_series("effective_sample_size")
    traces = [faint_line(iterations, values), line(iterations, smoothed(values), "effective sample size", COLORS[2])]
    return figure(traces, run, height=240, yaxis={"range": [0, 1.05]})


def source_weights(run: RunRecords) -> go.Figure:
    """Draw the mean weight of each source's samples."""
    traces = []
    for number, source in enumerate(run.sources):
        iterations, values = run.series("weight_by_source", source)
        traces.append(line(iterations, smoothed(values), source, color(number), line={"dash": dash(number)}))
    return figure(traces, run, shapes=[mark(1.0)])


def source_fractions(run: RunRecords) -> go.Figure:
    """Draw each source's fraction of the gradient, stacked; together they are 100 %."""
    steps = [step for step in run.steps if "share_by_source" in step]
    iterations = [step["iteration"] for step in steps]
    traces = []
    for number, source in enumerate(run.sources):
        values = smoothed([100 * step["share_by_source"].get(source, 0.0) for step in steps])
        pattern = {"shape": {"solid": "", "dash": "/", "dot": "."}[dash(number)]}
        area = {"stackgroup": "all", "fillcolor": faded(color(number), 0.75), "line": {"width": 0}}
        area |= {"fillpattern": pattern}
        traces.append(line(iterations, values, source, color(number), **area, hovertemplate="%{y:.1f} %"))
    return figure(traces, run, yaxis={"range": [0, 100], "ticksuffix": " %"})


def source_alignment(run: RunRecords, aligned: SourceAlignments) -> go.Figure:
    """Draw the mean alignment of each source's samples: single updates as points, running means as lines."""
    traces = []
    for number, source in enumerate(aligned.sources):
        column = aligned.mean[:, number]
        known = ~np.isnan(column)
        iterations, values = aligned.iterations[known].tolist(), column[known]
        dots = {"mode": "markers", "marker": {"size": 4, "color": faded(color(number), 0.5)}, "hoverinfo": "skip"}
        traces.append(line(iterations, values, "", color(number), **dots, hovertemplate=None, showlegend=False))
        # The first running means would be those of one update, two, and so on.
        means = smoothed(values, _MEAN_OF_UPDATES)[_MEAN_OF_UPDATES - 1 :]
        options = {"hovertemplate": "%{y:+.2f}", "line": {"dash": dash(number)}}
        traces.append(line(iterations[_MEAN_OF_UPDATES - 1 :], means, source, color(number), **options))
    layout = note(TOO_FEW) if len(aligned.iterations) < MIN_UPDATES else {}
    return figure(traces, run, shapes=[mark(0.0)], **layout)


def correlations(found: Mapping[str, Mapping[int, Correlations]], within: str) -> go.Figure:
    """Draw rank correlations of the weight with each property, a row each, with their intervals.

    Args:
        found: correlations by the property's label and stage.
        within: ``in_batch`` or ``in_source``.
    """
    stages = sorted({stage for by_stage in found.values() for stage in by_stage})
    names = [label(name).replace(" (", "<br>(") for name in found]
    traces: list[go.Scatter] = []
    notes: list[str] = []
    for place, stage in enumerate(stages):
        estimates: list[Estimate] = [getattr(by_stage[stage], within) for by_stage in found.values()]
        known = [(row, estimate) for row, estimate in enumerate(estimates) if estimate.is_known]
        # Stages stand one under the other in a property's row.
        offset = 0.6 * ((place + 0.5) / len(stages) - 0.5)
        shade = stage_color(place, len(stages))
        traces.append(
            go.Scatter(
                x=rounded(estimate.value or 0.0 for _, estimate in known),
                y=[row + offset for row, _ in known],
                mode="markers",
                name=f"stage {stage}",
                marker={"size": 7, "color": shade},
                error_x={
                    "array": rounded((e.high or 0.0) - (e.value or 0.0) for _, e in known),
                    "arrayminus": rounded((e.value or 0.0) - (e.low or 0.0) for _, e in known),
                    "color": shade,
                    "thickness": 1.5,
                    "width": 0,
                },
                customdata=[[names[row], e.low, e.high, f"{e.n:,} {e.unit}"] for row, e in known],
                hovertemplate="%{customdata[0]}: %{x:+.2f}, 95 % interval %{customdata[1]:+.2f} to "
                "%{customdata[2]:+.2f}, n = %{customdata[3]}",
            )
        )
        if not known:
            notes.append(f"stage {stage}: {TOO_FEW}")
    rows = {"tickvals": list(range(len(names))), "ticktext": names, "range": [len(names) - 0.5, -0.5], "ticklen": 0}
    layout = note("<br>".join(notes)) if len(notes) == len(stages) else {}
    return figure(
        traces,
        height=110 + 44 * len(names),
        hovermode="closest",
        showlegend=True,
        xaxis={"title": axis_title("rank correlation"), "range": [-1.05, 1.05]},
        yaxis=rows,
        shapes=[{**mark(0.0), "xref": "x", "yref": "paper", "x0": 0, "x1": 0, "y0": 0, "y1": 1}],
        **layout,
    )


def quartile_groups(by_stage: Mapping[int, list[QuartileGroup]], stages: int) -> go.Figure:
    """Draw the mean weight over the quarters of one property, a line for each stage that has enough updates.

    Args:
        by_stage: the quarters, lowest values first.
        stages: all stages of the run, drawn or not; they determine the colors.
    """
    traces = []
    for place, (stage, groups) in enumerate(by_stage.items()):
        shade = stage_color(place + stages - len(by_stage), stages)
        traces.append(
            go.Scatter(
                x=list(range(1, len(groups) + 1)),
                y=rounded(group.weight for group in groups),
                mode="lines+markers",
                name=f"stage {stage}",
                line={"color": shade, "width": 2},
                marker={"size": 6},
                error_y={"array": rounded(1.96 * g.error for g in groups), "color": shade, "thickness": 1, "width": 3},
                customdata=[[g.low, g.high, f"{g.n:,}"] for g in groups],
                hovertemplate="%{y:.2f}, values %{customdata[0]:.3g} to %{customdata[1]:.3g}, "
                "n = %{customdata[2]} samples",
            )
        )
    last = max((len(groups) for groups in by_stage.values()), default=4)
    layout = {} if by_stage else note(TOO_FEW)
    xaxis = {"tickvals": [1, last], "ticktext": ["low", "high"], "title": {"text": ""}, "range": [0.7, last + 0.3]}
    return figure(traces, height=220, hovermode="closest", showlegend=False, xaxis=xaxis, shapes=[mark(1.0)], **layout)


def document_weights(history: WeightHistory) -> go.Figure:
    """Draw the weight of documents over the exports of the weighter."""
    ticks = [digit * 10.0**power for power in range(-4, 4) for digit in (1, 2, 5)]
    traces = []
    for number, document in enumerate(history.documents):
        options = {"mode": "lines+markers", "marker": {"size": 6}, "line": {"dash": dash(number)}}
        name = f"{number + 1}: {document.source}"
        traces.append(line(history.iterations, document.weights, name, color(number), **options))
    return figure(
        traces,
        height=380,
        hovermode="closest",
        shapes=[{**mark(1.0), "line": {"color": FAINT, "width": 1, "dash": "dash"}}],
        yaxis={"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]},
    )
