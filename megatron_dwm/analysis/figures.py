"""Plots of a run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dwm.analysis.records import RunRecords


def training_figure(run: RunRecords) -> Any:
    """Losses above, mean weight of each data source below, over iterations: a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    losses, weights = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    draw_losses(losses, run)
    draw_by_source(weights, run, "weight_by_source", "mean relative weight")
    weights.axhline(1.0, color="0.6", linewidth=0.8, linestyle="--")
    weights.set_xlabel("iteration")
    for axes in (losses, weights):
        shade_stages(axes, run)
    return figure


def draw_losses(axes: Any, run: RunRecords) -> None:
    """Training, evaluation and target losses."""
    steps = [step for step in run.steps if step["lm_loss"] is not None]
    iterations = [step["iteration"] for step in steps]
    losses = [step["lm_loss"] for step in steps]
    axes.plot(iterations, losses, color="0.8", linewidth=0.8)
    axes.plot(iterations, smoothed(losses), color="0.3", label="training (unweighted)")
    for split, colour in (("valid", "tab:blue"), ("test", "tab:green")):
        points = run.evaluated(split)
        if points:
            axes.plot(*_points(points, "lm_loss"), "o-", markersize=3.5, color=colour, label=split)
    if run.updates:
        axes.plot(
            *_points(run.updates, "target_loss_after"), ".", color="tab:red", markersize=4, label="target batches"
        )
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)


def draw_by_source(axes: Any, run: RunRecords, name: str, label: str) -> None:
    """One smoothed line for each data source."""
    drawn = False
    for source in run.sources:
        iterations, values = run.series(name, source)
        if iterations:
            axes.plot(iterations, smoothed(values), label=source)
            drawn = True
    axes.set_ylabel(label)
    if drawn:
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "no weighted step in this run", transform=axes.transAxes, ha="center")


def shade_stages(axes: Any, run: RunRecords) -> None:
    """Shade every other stage; the warm-up, stage 0, stays white."""
    starts = [run.steps[0]["iteration"]]
    stages = [run.steps[0].get("stage", 0)]
    for before, step in pairwise(run.steps):
        if step.get("stage", 0) != before.get("stage", 0):
            starts.append(step["iteration"])
            stages.append(step["stage"])
    ends = [*starts[1:], run.steps[-1]["iteration"]]
    for start, end, stage in zip(starts, ends, stages, strict=True):
        if stage % 2:
            axes.axvspan(start, end, color="0.95", zorder=0)


def smoothed(values: Sequence[float], width: int = 9) -> np.ndarray:
    """Centred running mean; near the ends of fewer values."""
    kernel = np.ones(min(width, len(values)))
    total = np.convolve(values, kernel, mode="same")
    return total / np.convolve(np.ones(len(values)), kernel, mode="same")


def save_png(figure: Any, path: Path) -> None:
    """Write ``figure`` beside ``path``, then put it in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    figure.savefig(beside, format="png", dpi=120)
    beside.replace(path)


def _points(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    return [record["iteration"] for record in records], [record[name] for record in records]
