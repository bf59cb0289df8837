"""Results of several checkpoints side by side: a table, a JSON document and a plot over training."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from megatron_dwm.analysis.task_evaluation import MetricEstimate, TaskResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = {
    "acc": "accuracy",
    "acc_norm": "accuracy, by length",
    "exact_match": "exact match",
    "answer_nll": "nats per answer",
    "choice_nll": "nats per choice",
}
"""The metrics that are shown, and their names; lower nats are better."""


@dataclass(frozen=True)
class CheckpointResults:
    """Results of one checkpoint."""

    name: str
    """The name that the user gave."""
    run: str
    """The folder of its run: checkpoints of one run are one line of the plot."""
    iteration: int | None
    results: list[TaskResult]


def name_of(path: Path) -> tuple[str, int | None]:
    """Return the run's name and the iteration of a checkpoint's folder."""
    match = re.fullmatch(r"iter_(\d+)", path.name)
    return (str(path.parent), int(match[1])) if match else (str(path), None)


def difference(result: TaskResult, first: TaskResult, metric: str) -> MetricEstimate | None:
    """Return a likelihood's mean difference from the first checkpoint's, item by item; None without items in common.

    The items are the same, so that their difficulty cancels: its standard error is smaller than those of the two.
    """
    here, there = result.values.get(metric, {}), first.values.get(metric, {})
    common = sorted(here.keys() & there.keys())
    return MetricEstimate.of([here[item] - there[item] for item in common]) if common else None


def table(checkpoints: Sequence[CheckpointResults]) -> str:
    """Return the results as text, a block for each task and number of examples."""
    width = max(len(each.name) for each in checkpoints)
    blocks = []
    for place, first in enumerate(checkpoints[0].results):
        shown = [metric for metric in METRICS if metric in first.metrics]
        lines = [f"{first.task}, {first.num_fewshot} examples, {first.samples} items"]
        lines.append("  " + " " * width + "".join(f"  {METRICS[metric]:>36}" for metric in shown))
        for each in checkpoints:
            result = each.results[place]
            cells = []
            for metric in shown:
                cell = str(result.metrics[metric])
                change = difference(result, first, metric) if each is not checkpoints[0] else None
                if change is not None:
                    cell += f" ({'' if change.mean < 0 else '+'}{change})"
                cells.append(f"  {cell:>36}")
            lines.append(f"  {each.name:{width}}" + "".join(cells))
        blocks.append("\n".join(lines))
    note = "± is a standard error. In brackets: the difference from the first checkpoint on the same items."
    return "\n\n".join([*blocks, note if len(checkpoints) > 1 else "± is a standard error."])


def as_json(checkpoints: Sequence[CheckpointResults], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the results with the settings that they were made with."""
    return {
        "settings": settings,
        "checkpoints": [
            {
                "checkpoint": each.name,
                "run": each.run,
                "iteration": each.iteration,
                "results": [
                    {
                        "task": result.task,
                        "num_fewshot": result.num_fewshot,
                        "samples": result.samples,
                        "metrics": {name: value.as_json() for name, value in result.metrics.items()},
                        "difference_from_first": {
                            name: change.as_json()
                            for name in result.values
                            if (change := difference(result, checkpoints[0].results[place], name)) is not None
                        },
                    }
                    for place, result in enumerate(each.results)
                ],
            }
            for each in checkpoints
        ],
    }


def figure(checkpoints: Sequence[CheckpointResults]) -> Figure:
    """Return a plot: a row for each task and number of examples, accuracy beside likelihood.

    If a run has several checkpoints, it is a line over the iterations, and a checkpoint without an iteration is a
    horizontal line. Otherwise each checkpoint is a point with its name.
    """
    rows = checkpoints[0].results
    of_runs = Counter(each.run for each in checkpoints if each.iteration is not None)
    is_over_training = max(of_runs.values(), default=0) > 1
    height = 2.6 if is_over_training else 1 + len(checkpoints) / 3
    drawn = Figure(figsize=(10, height * len(rows)), layout="constrained")
    grid = drawn.subplots(len(rows), 2, squeeze=False)
    for place, first in enumerate(rows):
        for axes, metrics in zip(grid[place], (("acc", "exact_match"), ("choice_nll", "answer_nll")), strict=True):
            metric = next((name for name in metrics if name in first.metrics), None)
            if metric is None:
                axes.set_visible(False)
                continue
            found = [each.results[place].metrics[metric] for each in checkpoints]
            draw = _draw_over_training if is_over_training else _draw_by_name
            draw(axes, checkpoints, found)
            (axes.set_ylabel if is_over_training else axes.set_xlabel)(METRICS[metric])
            chance = first.chance(metric)
            if chance is not None:
                line = axes.axhline if is_over_training else axes.axvline
                line(chance, linestyle=":", color="gray", label="chance")
            axes.set_title(f"{first.task}, {first.num_fewshot} examples", fontsize=9)
    legend = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    drawn.legend(legend.values(), legend.keys(), loc="outside upper center", fontsize=8)
    return drawn


def _draw_over_training(axes: Axes, checkpoints: Sequence[CheckpointResults], found: Sequence[MetricEstimate]) -> None:
    for number, run in enumerate(dict.fromkeys(each.run for each in checkpoints)):
        of_run = [(each.iteration, value) for each, value in zip(checkpoints, found, strict=True) if each.run == run]
        points = [(iteration, value) for iteration, value in of_run if iteration is not None]
        points.sort(key=lambda point: point[0])
        if points:
            means, errors = zip(*(_drawn(value) for _, value in points), strict=True)
            axes.errorbar([i for i, _ in points], means, errors, marker="o", capsize=3, label=run, color=f"C{number}")
        else:
            axes.axhline(of_run[0][1].mean, linestyle="--", label=run, color=f"C{number}")
    axes.set_xlabel("iteration")


def _draw_by_name(axes: Axes, checkpoints: Sequence[CheckpointResults], found: Sequence[MetricEstimate]) -> None:
    places = range(len(checkpoints))
    means, errors = zip(*map(_drawn, found), strict=True)
    axes.errorbar(means, places, xerr=errors, fmt="o", capsize=3)
    axes.set_yticks(places, _short_names(checkpoints), fontsize=8)
    axes.set_ylim(len(checkpoints) - 0.5, -0.5)  # the first one on top


def _short_names(checkpoints: Sequence[CheckpointResults]) -> list[str]:
    """Return the checkpoints' paths without the folders in which all runs are: long paths would leave no room."""
    shared = os.path.commonpath([Path(each.run).absolute().parent for each in checkpoints])
    return [os.path.relpath(each.name, shared) for each in checkpoints]


def _drawn(value: MetricEstimate) -> tuple[float, float]:
    """Return the mean and the length of its error bar."""
    return value.mean, 0.0 if math.isnan(value.stderr) else value.stderr
