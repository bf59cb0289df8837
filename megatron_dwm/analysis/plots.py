"""Plots of a run, as matplotlib figures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure

from megatron_dwm.analysis.records import Record, RunRecords
from megatron_dwm.analysis.running_mean import smoothed
from megatron_dwm.atomic_write import atomic_write_bytes
from megatron_dwm.errors import UserError, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def training_figure(run: RunRecords, baseline: RunRecords | None = None) -> Figure:
    """Draw losses above, mean weight of each data source below, over iterations.

    Args:
        run: the run's records.
        baseline: the records of the same run with uniform weights; its evaluations are drawn for comparison.
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
        label: label of the vertical axis.
    """
    drawn = False
    for number, source in enumerate(run.sources):
        iterations, values = run.series(name, source)
        if iterations:
            style = ("-", "--", ":")[number // 10 % 3]  # where matplotlib's ten colors repeat
            axes.plot(iterations, smoothed(values), style, color=f"C{number % 10}", label=legend_text(source))
            drawn = True
    axes.set_ylabel(label)
    if drawn:
        axes.legend(frameon=False, ncols=1 + len(run.sources) // 6, fontsize="small")
    else:
        axes.text(0.5, 0.5, "no weighted step in this run", transform=axes.transAxes, ha="center")


def shade_stages(axes: Axes, run: RunRecords) -> None:
    """Shade every other stage; the warm-up, stage 0, stays white."""
    for span in run.stage_spans:
        if span.stage % 2:
            axes.axvspan(span.start, span.end, color=_faint(), alpha=0.15, linewidth=0, zorder=0)


def _ink() -> str:
    return str(matplotlib.rcParams["text.color"])


def _faint() -> str:
    return str(matplotlib.rcParams["grid.color"])


def _mark_uniform(axes: Axes) -> None:
    """Draw a line at weight 1."""
    axes.axhline(1.0, color=_faint(), linewidth=0.8, linestyle="--")


def legend_text(name: str) -> str:
    """Return a name from the data, escaped so that matplotlib shows it literally; a long one is shortened.

    Dollar signs would begin a formula, a leading underscore would hide it from the legend, and half of a surrogate pair
    cannot be drawn.
    """
    drawable = shortened(name.encode("utf-8", "replace").decode("utf-8"), 40).replace("$", r"\$")
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
    try:
        atomic_write_bytes(path, png(figure))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--output {path}: cannot be written ({reason}); give another path") from None


def _points(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    """Return iterations and values of the records whose value is finite."""
    known = [record for record in records if record[name] is not None]
    return [record["iteration"] for record in known], [record[name] for record in known]
