"""Comparison of several runs: their names, their costs, and figures with a line for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from megatron_dwm.analysis.comparison import catch_up_fractions, training_seconds
from megatron_dwm.analysis.records import Curve, RunRecords, run_folder
from megatron_dwm.analysis.report.drawing import axis_title, faint_line, figure, line, mark
from megatron_dwm.analysis.report.palette import color, dash
from megatron_dwm.analysis.running_mean import smoothed


@dataclass(frozen=True)
class RunCost:
    """A row of the table of costs."""

    iterations: int
    samples: int | None
    updates: int
    seconds: float | None
    """Training time, including all overhead of weighting, without evaluations."""
    seconds_per_iteration: float | None
    """The median, which is not affected by updates of the weighter and a slow start."""
    effective_sample_size: float | None
    """Mean over the last quarter of the weighted steps."""
    losses: dict[str, float]
    """The last of each evaluated set."""
    tokens_ratio: float | None = None
    time_ratio: float | None = None
    """Fractions of the first run's tokens and time at which its last evaluation loss was reached."""
    reaches: bool | None = None
    """Whether it was reached; None if the runs cannot be compared."""


def cost(run: RunRecords, first: RunRecords | None = None) -> RunCost:
    """Return the cost and the final loss of a run; with ``first``, also when it reached that run's last loss."""
    has_times = _has_times(run)
    sizes = run.step_series("effective_sample_size").values
    ratios: tuple[float, float] | None = None
    reaches: bool | None = None
    if first is not None and all(_has_times(each) and _has_losses(each) for each in (first, run)):
        ratios = catch_up_fractions(first, run)
        reaches = ratios is not None
    return RunCost(
        iterations=run.steps[-1]["iteration"],
        samples=run.steps[-1].get("consumed_samples"),
        updates=len(run.updates),
        seconds=training_seconds(run.steps) if has_times else None,
        seconds_per_iteration=float(np.median([step["seconds"] for step in run.steps])) if has_times else None,
        effective_sample_size=float(np.mean(sizes[-max(1, len(sizes) // 4) :])) if sizes else None,
        losses={name: curve.values[-1] for name, curve in run.evaluation_curves.items()},
        tokens_ratio=ratios[0] if ratios is not None else None,
        time_ratio=ratios[1] if ratios is not None else None,
        reaches=reaches,
    )


def _has_times(run: RunRecords) -> bool:
    return all(step.get("seconds") is not None for step in run.steps)


def _has_losses(run: RunRecords) -> bool:
    """Return whether a run was evaluated, and always with a finite loss."""
    losses = [record["lm_loss"] for record in run.evaluated("valid")]
    return bool(losses) and None not in losses


def run_names(paths: Sequence[Path]) -> list[str]:
    """Return short, different names of the runs: their paths without the common parent folders."""
    parts = [run_folder(path).resolve().parts for path in paths]
    while len({of_path[0] for of_path in parts if len(of_path) > 1}) == 1 and min(map(len, parts)) > 1:
        parts = [of_path[1:] for of_path in parts]
    while len({of_path[-1] for of_path in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [of_path[:-1] for of_path in parts]
    names = ["/".join(of_path) for of_path in parts]
    return [
        f"{name} ({names[:place].count(name) + 1})" if names.count(name) > 1 else name
        for place, name in enumerate(names)
    ]


def figures(runs: Mapping[str, RunRecords]) -> dict[str, dict[str, tuple[str, go.Figure]]]:
    """Return the figures with their titles, by name, in groups: loss, weights, cost."""
    evaluated = list(dict.fromkeys(name for run in runs.values() for name in run.evaluation_curves))
    evaluated.sort(key=lambda name: ": " in name)
    sources = list(dict.fromkeys(name for run in runs.values() for name in run.sources))
    curves = {name: run.evaluation_curves for name, run in runs.items()}
    losses = {
        f"loss-{number}": (
            f"Evaluation loss, {split} (nats per token)",
            _overlaid(
                {name: of_run[split] for name, of_run in curves.items() if split in of_run}, list(runs), dots=True
            ),
        )
        for number, split in enumerate(evaluated)
        # A point of each run is no curve; the table has it.
        if any(len(of_run[split].values) > 1 for of_run in curves.values() if split in of_run)
    }
    training = {name: run.step_series("lm_loss") for name, run in runs.items()}
    losses["loss-training"] = (
        "Training loss of all samples, each counted alike (nats per token)",
        _overlaid(training, list(runs), smooth=True),
    )
    weights: dict[str, tuple[str, go.Figure]] = {}
    for number, source in enumerate(sources):
        by_run = {name: run.series("weight_by_source", source) for name, run in runs.items()}
        by_run = {name: curve for name, curve in by_run.items() if curve.values}
        if by_run:
            drawing = _overlaid(by_run, list(runs), smooth=True, shapes=[mark(1.0)], height=260)
            weights[f"weight-{number}"] = (source, drawing)
    sizes = {name: run.step_series("effective_sample_size") for name, run in runs.items()}
    sizes = {name: curve for name, curve in sizes.items() if curve.values}
    size: dict[str, tuple[str, go.Figure]] = {}
    if sizes:
        axis: dict[str, Any] = {"yaxis": {"range": [0, 1.05]}, "height": 260}
        title = "Effective sample size (fraction of the batch)"
        size["size"] = (title, _overlaid(sizes, list(runs), smooth=True, **axis))
    return {"losses": losses, "weights": weights, "size": size, "cost": _over_time(runs, evaluated)}


def _over_time(runs: Mapping[str, RunRecords], evaluated: Sequence[str]) -> dict[str, tuple[str, go.Figure]]:
    """Return the evaluation loss over the seconds of training, if all runs recorded those."""
    timed = {name: run for name, run in runs.items() if _has_times(run)}
    if len(timed) < 2 or not evaluated:
        return {}
    curves = {}
    for name, run in timed.items():
        if evaluated[0] in run.evaluation_curves:
            seconds = list(accumulate(step["seconds"] for step in run.steps))
            until = dict(zip((step["iteration"] for step in run.steps), seconds, strict=True))
            points = zip(*run.evaluation_curves[evaluated[0]], strict=True)
            known = [(until[iteration], loss) for iteration, loss in points if iteration in until]
            curves[name] = Curve([round(at) for at, _ in known], [loss for _, loss in known])
    axis: dict[str, Any] = {"xaxis": {"title": axis_title("seconds of training")}, "hovermode": "closest"}
    drawing = _overlaid(curves, list(runs), dots=True, **axis)
    return {"time": (f"Evaluation loss, {evaluated[0]}, over training time (nats per token)", drawing)}


def _overlaid(
    curves: Mapping[str, Curve], names: Sequence[str], *, dots: bool = False, smooth: bool = False, **layout: Any
) -> go.Figure:
    """Return a figure with a line for each run; a run has the same color in every figure."""
    traces = []
    for name, (iterations, values) in curves.items():
        shade = color(names.index(name))
        if smooth:
            traces.append(faint_line(iterations, values, shade))
        style: dict[str, Any] = {"line": {"dash": dash(names.index(name))}}
        style |= {"mode": "lines+markers", "marker": {"size": 5}} if dots else {}
        traces.append(line(iterations, smoothed(values) if smooth else values, name, shade, **style))
    return figure(traces, showlegend=True, **layout)
