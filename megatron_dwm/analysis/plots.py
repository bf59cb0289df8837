"""Plots of a run, as matplotlib figures."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from megatron_dwm.analysis.preference import (
    QUANTILES,
    Correlations,
    WeightedSamples,
    quarters,
    standardized,
    weight_quantiles,
)
from megatron_dwm.analysis.records import Record, RunRecords
from megatron_dwm.atomic_write import atomic_files
from megatron_dwm.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Theme = Literal["light", "dark"]
_INK = {"light": ("#1d232b", "#8a929d", "#ffffff"), "dark": ("#e4e8ee", "#7b8490", "#171b21")}
_COLORS = {
    "light": ["#3566b8", "#d9782d", "#2e8b62", "#b8476a", "#7a5bb0", "#8f6b2f", "#3a94a8", "#6b7480"],
    "dark": ["#7ba6ee", "#f0a263", "#67c79a", "#ee86a6", "#b59bea", "#cfae6d", "#70cadd", "#a9b2be"],
}


@contextmanager
def theme(name: Theme) -> Iterator[None]:
    """Draw and save the figures of the block for a light or a dark page."""
    from cycler import cycler

    ink, faint, paper = _INK[name]
    settings: Any = {
        "text.color": ink,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.edgecolor": faint,
        "grid.color": faint,
        "figure.facecolor": paper,
        "savefig.facecolor": paper,
        "axes.facecolor": paper,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=_COLORS[name]),
        "font.size": 10,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
    }
    with matplotlib.rc_context(settings):
        yield


def training_figure(run: RunRecords, baseline: RunRecords | None = None) -> Figure:
    """Draw losses above, mean weight of each data source below, over iterations.

    Args:
        run: the run's records.
        baseline: those of the same run with uniform weights, whose evaluations are drawn beside.
    """
    figure = Figure(figsize=(9, 7), layout="constrained")
    losses, weights = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    draw_losses(losses, run)
    if baseline is not None:
        points = _points(baseline.evaluated("valid"), "lm_loss")
        losses.plot(*points, "o--", markersize=3.5, color="C1", label="valid, uniform weights")
        losses.legend(frameon=False)
    draw_by_source(weights, run, "weight_by_source", "mean weight")
    _mark_uniform(weights)
    weights.set_xlabel("iteration")
    for axes in (losses, weights):
        shade_stages(axes, run)
    return figure


def losses_figure(run: RunRecords) -> Figure:
    """Draw the losses over iterations."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots()
    draw_losses(axes, run)
    axes.set_xlabel("iteration")
    shade_stages(axes, run)
    return figure


def draw_losses(axes: Axes, run: RunRecords) -> None:
    """Draw training, evaluation and target losses."""
    steps = [step for step in run.steps if step["lm_loss"] is not None]
    iterations = [step["iteration"] for step in steps]
    losses = [step["lm_loss"] for step in steps]
    axes.plot(iterations, losses, color=_faint(), linewidth=0.8, alpha=0.6)
    axes.plot(iterations, smoothed(losses), color=_ink(), alpha=0.8, label="training (unweighted)")
    for split, color in (("valid", "C0"), ("test", "C2")):
        points = run.evaluated(split)
        if points:
            axes.plot(*_points(points, "lm_loss"), "o-", markersize=3.5, color=color, label=split)
    if run.updates:
        axes.plot(*_points(run.updates, "target_loss"), ".", color="C3", markersize=4, label="target batches")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)


def draw_by_source(axes: Axes, run: RunRecords, name: str, label: str) -> None:
    """Draw one smoothed line for each data source.

    Args:
        axes: where to draw.
        run: the run's records.
        name: the figure that steps hold by source.
        label: of the vertical axis.
    """
    drawn = False
    for source in run.sources:
        iterations, values = run.series(name, source)
        if iterations:
            axes.plot(iterations, smoothed(values), label=legend_text(source))
            drawn = True
    axes.set_ylabel(label)
    if drawn:
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "no weighted step in this run", transform=axes.transAxes, ha="center")


def weights_figure(run: RunRecords) -> Figure:
    """Draw quantiles of the outer updates' weights above, effective sample size below, over iterations."""
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    spread, size = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    if run.updates:
        iterations = [update["iteration"] for update in run.updates]
        low, lower, middle, upper, high = np.array([weight_quantiles(update) for update in run.updates]).T
        percent = [f"{100 * quantile:g}" for quantile in QUANTILES]
        spread.fill_between(
            iterations, low, high, alpha=0.2, linewidth=0, color="C0", label=f"{percent[0]}-{percent[4]} % of samples"
        )
        spread.fill_between(
            iterations, lower, upper, alpha=0.35, linewidth=0, color="C0", label=f"{percent[1]}-{percent[3]} %"
        )
        spread.plot(iterations, middle, color="C0", label="median")
        spread.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    _mark_uniform(spread)
    spread.set_ylabel("weight")
    steps = [step for step in run.steps if "effective_sample_size" in step]
    iterations, values = _points(steps, "effective_sample_size")
    size.plot(iterations, values, color=_faint(), linewidth=0.8, alpha=0.6)
    if values:
        size.plot(iterations, smoothed(values), color="C2")
    size.set_ylim(0, 1.05)
    size.set_ylabel("effective sample size\n(fraction of the batch)")
    size.set_xlabel("iteration")
    for axes in (spread, size):
        shade_stages(axes, run)
    return figure


def sources_figure(run: RunRecords) -> Figure:
    """Draw by data source, over iterations: mean weight, fraction of the gradient, mean standardized alignment."""
    figure = Figure(figsize=(9, 8.4), layout="constrained")
    weights, fractions, alignments = figure.subplots(3, 1, sharex=True)
    draw_by_source(weights, run, "weight_by_source", "mean weight")
    _mark_uniform(weights)
    draw_loss_fractions(fractions, run)
    for source in run.sources:
        points = []
        for update in run.updates:
            of_source = np.array(update["samples"]["source"]) == source
            if of_source.any():
                points.append((update["iteration"], standardized(update["samples"]["alignment"])[of_source].mean()))
        iterations, values = [x for x, _ in points], [y for _, y in points]
        # A rare source may be in no batch; it is drawn all the same, so that the others keep their colors.
        alignments.plot(iterations, smoothed(values, 5), marker="o", markersize=3, label=legend_text(source))
    alignments.axhline(0.0, color=_faint(), linewidth=0.8, linestyle="--")
    alignments.set_ylabel("mean alignment\n(standard deviations)")
    alignments.set_xlabel("iteration")
    for axes in (weights, fractions, alignments):
        shade_stages(axes, run)
    return figure


def draw_loss_fractions(axes: Axes, run: RunRecords) -> None:
    """Draw each source's fraction of the trained loss, stacked; together they are 100 %."""
    steps = [step for step in run.steps if "share_by_source" in step]
    if not steps:
        axes.text(0.5, 0.5, "not in this run's records", transform=axes.transAxes, ha="center")
        return
    iterations = [step["iteration"] for step in steps]
    stacked = [smoothed([100 * step["share_by_source"].get(source, 0.0) for step in steps]) for source in run.sources]
    axes.stackplot(iterations, stacked, labels=[legend_text(source) for source in run.sources], linewidth=0)
    axes.set_ylim(0, 100)
    axes.set_ylabel("fraction of the gradient (%)")


def correlations_figure(found: Mapping[str, Mapping[int, Correlations]]) -> Figure:
    """Draw rank correlations of the weight with each property by stage: within batches, and within sources.

    Args:
        found: correlations by the property's label and stage.
    """
    stages = sorted({stage for by_stage in found.values() for stage in by_stage})
    figure = Figure(figsize=(9, 1.5 + 0.42 * len(found)), layout="constrained")
    sides = figure.subplots(1, 2, sharey=True)
    titles = {"in_batch": "among all samples of a batch", "in_source": "among samples of one source"}
    image = None
    for axes, (name, title) in zip(sides, titles.items(), strict=True):
        values = np.array(
            [
                [np.nan if (rho := getattr(by_stage[stage], name)) is None else rho for stage in stages]
                for by_stage in found.values()
            ]
        )
        # The text on a cell is dark in both themes: this part of the color map is light enough for it everywhere.
        image = axes.imshow(values, cmap="RdBu", vmin=-1.4, vmax=1.4, aspect="auto")
        for (row, column), rho in np.ndenumerate(values):
            text, color = ("n/a", _faint()) if np.isnan(rho) else (f"{round(rho, 2) + 0.0:+.2f}", "#1d232b")
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color=color)
        axes.set_title(title)
        axes.set_xticks(range(len(stages)), [f"stage {stage}" for stage in stages])
        axes.set_yticks(range(len(found)), list(found))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    if image is not None:
        bar = figure.colorbar(image, ax=sides, shrink=0.8, label="rank correlation with the weight")
        bar.ax.set_ylim(-1, 1)
        bar.outline.set_visible(False)
    return figure


def quarters_figure(samples: WeightedSamples, properties: Mapping[str, np.ndarray]) -> Figure:
    """Draw the mean weight over the quarters of each property, a line for each stage.

    Args:
        samples: the samples, with their weights and stages.
        properties: values of each sample [n] by the property's label.
    """
    columns = min(3, len(properties))
    rows = -(-len(properties) // columns)
    figure = Figure(figsize=(9, 2.6 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    colors = matplotlib.colormaps["viridis"](np.linspace(0.28, 0.85, len(samples.stages)))
    for axes, (label, values) in zip(grid, properties.items(), strict=False):
        for stage, color in zip(samples.stages, colors, strict=True):
            in_stage = samples.stage == stage
            found = quarters(values[in_stage], samples.weight[in_stage])
            axes.plot([q.weight for q in found], "o-", markersize=4, color=color, label=f"stage {stage}")
        _mark_uniform(axes)
        axes.set_title(label)
        axes.set_xticks([])
        axes.set_xlabel("low → high")
    for axes in grid[len(properties) :]:
        axes.set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel("mean weight")
    if len(properties):
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=8, frameon=False)
    return figure


def shade_stages(axes: Axes, run: RunRecords) -> None:
    """Shade every other stage; the warm-up, stage 0, stays white."""
    starts = [run.steps[0]["iteration"]]
    stages = [run.steps[0].get("stage", 0)]
    for before, step in pairwise(run.steps):
        if step.get("stage", 0) != before.get("stage", 0):
            starts.append(step["iteration"])
            stages.append(step.get("stage", 0))
    ends = [*starts[1:], run.steps[-1]["iteration"]]
    for start, end, stage in zip(starts, ends, stages, strict=True):
        if stage % 2:
            axes.axvspan(start, end, color=_faint(), alpha=0.15, linewidth=0, zorder=0)


def _ink() -> str:
    return str(matplotlib.rcParams["text.color"])


def _faint() -> str:
    return str(matplotlib.rcParams["grid.color"])


def _mark_uniform(axes: Axes) -> None:
    """Draw a line at weight 1."""
    axes.axhline(1.0, color=_faint(), linewidth=0.8, linestyle="--")


def smoothed(values: Sequence[float], width: int = 9) -> np.ndarray:
    """Return the mean of each value and those before it, ``width`` values at most.

    It looks back only: a mean that looks ahead would move before the update that moves it.
    """
    if len(values) == 0:
        return np.empty(0)
    totals = np.convolve(values, np.ones(width))[: len(values)]
    means: np.ndarray = totals / np.minimum(np.arange(1, len(values) + 1), width)
    return means


def legend_text(name: str) -> str:
    """Return a name from the data as matplotlib shows it literally.

    Dollar signs would begin a formula, a leading underscore would hide it from the legend, and half of a surrogate pair
    cannot be drawn.
    """
    drawable = name.encode("utf-8", "replace").decode("utf-8").replace("$", r"\$")
    return f" {drawable}" if drawable.startswith("_") else drawable


def png(figure: Figure) -> bytes:
    """Return ``figure`` as a PNG file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def save_png(figure: Figure, path: Path) -> None:
    """Write ``figure`` as a PNG.

    Raises:
        UserError: the file cannot be written.
    """
    write_files(path.parent, {path.name: png(figure)})


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files into ``folder``, each whole or not at all.

    Raises:
        UserError: they cannot be written.
    """
    try:
        with atomic_files(folder) as scratch:
            for name, content in contents.items():
                (scratch / name).write_bytes(content)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--output {folder}: cannot be written ({reason}); give another path") from None


def _points(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    """Return iterations and values of the records whose value is finite."""
    known = [record for record in records if record[name] is not None]
    return [record["iteration"] for record in known], [record[name] for record in known]
