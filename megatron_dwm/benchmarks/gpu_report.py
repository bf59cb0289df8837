"""The results of ``benchmarks/gpu.sh`` as tables for docs/gpu.md, and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_dwm.benchmarks.benefit_report import interval
from megatron_dwm.runtime.device import peak_flops

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INTERVALS = (16, 100)
"""Between two outer updates; a run's throughput follows from the time of a weighted and of an updating iteration."""
GIB = 2**30

Results = Mapping[str, Any]


def ratios_to_plain(figures: Results, interval: int | None) -> list[float]:
    """Return the throughput of weighted training against plain training, turn by turn.

    Args:
        interval: between outer updates; None for a frozen weighter, which has none.
    """
    turns = figures["turns"]
    rows = zip(turns["plain"], turns["frozen"], turns["updating"], strict=True)
    if interval is None:
        return [plain / frozen for plain, frozen, _ in rows]
    return [plain * interval / ((interval - 1) * frozen + updating) for plain, frozen, updating in rows]


def update_costs(figures: Results) -> list[float]:
    """Return the time that an outer update adds to a step, in plain steps, turn by turn."""
    turns = figures["turns"]
    rows = zip(turns["plain"], turns["frozen"], turns["updating"], strict=True)
    return [(updating - frozen) / plain for plain, frozen, updating in rows]


def tables(results: Results) -> str:
    """Return all results as Markdown."""
    parts: list[str] = []
    costs = {name: results[name] for name in ("costs-125m", "costs-1b") if name in results}
    if costs:
        parts += [_time_table(costs), _memory_table(costs), _count_table(costs)]
    if "precision" in results:
        parts.append(_precision_table(results["precision"]))
    if "benefit" in results:
        parts.append(_benefit_table(results["benefit"]))
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(values: Sequence[float], digits: int) -> str:
    """Return the median, and the least and the largest value."""
    low, high = (format(f(values), f".{digits}f") for f in (min, max))
    return f"{statistics.median(values):.{digits}f} ({low} to {high})"


def _title(figures: Results) -> str:
    return f"{figures['parameters'] / 1e6:.3g} M"


def _time_table(costs: Results) -> str:
    """Return step times, MFU and throughput against plain training."""
    names = {"bare": "megatron-core alone", "plain": "plain", "frozen": "frozen", "updating": "step with an update"}
    rows = []
    for figures in costs.values():
        peak = peak_flops(figures["device"])
        for mode, label in names.items():
            turns = figures["turns"][mode]
            mfu = figures["training_flops"] / statistics.median(turns) / peak if peak else None
            ratio = [plain / other for plain, other in zip(figures["turns"]["plain"], turns, strict=True)]
            shown = "" if mfu is None or mode == "updating" else f"{mfu:.3f}"
            rows.append([_title(figures), label, _spread([1000 * x for x in turns], 1), shown, _spread(ratio, 4)])
        for number in INTERVALS:
            ratio = ratios_to_plain(figures, number)
            rows.append([_title(figures), f"bilevel, an update every {number} (computed)", "", "", _spread(ratio, 4)])
        rows.append([_title(figures), "an update, in plain steps", "", "", _spread(update_costs(figures), 3)])
        for way, turns in figures["update_seconds"].items():
            steps = [x / statistics.median(figures["turns"]["plain"]) for x in turns]
            label = f"step with an update, {way} alignments, in plain steps"
            rows.append([_title(figures), label, _spread([1000 * x for x in turns], 1), "", _spread(steps, 2)])
    head = ["model", "iteration", "ms, median (range)", "MFU", "throughput of plain, median (range)"]
    device = next(iter(costs.values()))["device"]
    return f"Time, on {device}:\n\n" + _table(head, rows)


def _memory_table(costs: Results) -> str:
    """Return what iterations need beyond what is held between them, measured and as ``--plan`` predicts it."""
    has_plans = all("plan" in figures for figures in costs.values())
    rows = []
    for figures in costs.values():
        memory = figures["peak_memory"]
        both = memory["parameter_copy_bytes"] + memory["gradient_copy_bytes"]
        planned = _planned_memory(figures["plan"]) if has_plans else {}
        for label, key in (
            ("copy of the parameters", "parameter_copy_bytes"),
            ("copy of the gradients", "gradient_copy_bytes"),
            ("plain step", "plain_step_bytes"),
            ("frozen step", "weighted_step_bytes"),
            ("step with an update", "outer_update_bytes"),
            ("step with an update, above plain", "outer_update_above_plain_bytes"),
            ("held by the weighter", "weighter_bytes"),
        ):
            prediction = [f"{planned[key] / GIB:.3f}" if key in planned else ""] * has_plans
            rows.append([_title(figures), label, f"{memory[key] / GIB:.3f}", *prediction, f"{memory[key] / both:.3f}"])
    head = ["model", "what", "GiB", *["by --plan"] * has_plans, "in copies of parameters and gradients"]
    return "Peak memory beyond what is held between iterations:\n\n" + _table(head, rows)


def _planned_memory(plan: Results) -> dict[str, float]:
    """Return the bytes that ``--plan`` predicts for one process, by the name of what is measured."""
    (stage,) = plan["memory"]
    step, update = stage["activations"], stage["weighting_in_update"]
    return {
        "parameter_copy_bytes": stage["weights"],
        "gradient_copy_bytes": stage["gradients"],
        "plain_step_bytes": step,
        "outer_update_bytes": step + update,
        "outer_update_above_plain_bytes": update,
    }


def _count_table(costs: Results) -> str:
    """Return kernel launches and reads by the host."""
    names = ("kernel_launches", "scalar_reads", "waits")
    rows = [
        [_title(figures), mode, *(str(counts[name]) for name in names)]
        for figures in costs.values()
        for mode, counts in figures["device_counts"].items()
    ]
    head = ["model", "iteration", "kernel launches", "scalars read", "waits for the device"]
    return "What the host asks of the device:\n\n" + _table(head, rows)


def _precision_table(figures: Results) -> str:
    """Return how far alignments are from exact ones in fp32."""
    keys = ("cosine", "correlation", "lowest_correlation", "rank_correlation", "relative_error")
    rows = [
        [name, *(f"{values[key]:.4f}" for key in keys)]
        for name, values in figures["agreement"].items()
        if not name.startswith("fp32 exact")
    ]
    head = ["alignments", "cosine", "correlation", "lowest of a batch", "rank correlation", "relative error"]
    size = f"{_title(figures)} parameters after {figures['steps']} steps, {figures['batches']} batches"
    of = f"{figures['samples_of_a_batch']} samples"
    return f"Against exact alignments in fp32 ({size} of {of}):\n\n" + _table(head, rows)


def _benefit_table(result: Results) -> str:
    """Return the test losses of the arms, and their differences from uniform's, seed by seed."""
    rows, uniform = [], result["arms"]["uniform"]["test_loss"]
    for name, arm in result["arms"].items():
        pairs = zip(arm["test_loss"], uniform, strict=True)
        difference = "" if name == "uniform" else interval([here - there for here, there in pairs])
        rows.append([name, interval(arm["test_loss"]), difference, f"{statistics.mean(arm['seconds']):.0f}"])
    names = {"gap_closed": "gap closed", "token_ratio": "of uniform's tokens", "time_ratio": "of uniform's time"}
    notes = [f"{label}: {result[key]:.2f}" for key, label in names.items() if result[key] is not None]
    head = "Mean and 95 % interval of the seeds" if len(uniform) > 1 else "One seed"
    losses = f"{head}:\n\n" + _table(["weights", "test loss", "minus uniform", "seconds"], rows)
    return "\n\n".join([losses, ", ".join(notes)] if notes else [losses])


def figure(results: Results) -> Figure:
    """Draw the available results: throughput, memory, alignments in both precisions, losses of the comparison."""
    from matplotlib.figure import Figure

    costs = [results[name] for name in ("costs-125m", "costs-1b") if name in results]
    draw: list[Callable[[Axes], None]] = []
    if costs:
        draw += [partial(_draw_throughput, costs=costs), partial(_draw_memory, costs=costs)]
    if "precision" in results:
        draw.append(partial(_draw_alignments, alignments=results["precision"]["alignments"]))
    if "benefit" in results:
        draw.append(partial(_draw_losses, curves=results["benefit"]["curves"]))
    drawing = Figure(figsize=(5 * len(draw), 4), layout="constrained")
    for axes, draw_on in zip(drawing.subplots(1, len(draw), squeeze=False)[0], draw, strict=True):
        draw_on(axes)
    return drawing


def _draw_throughput(axes: Axes, costs: Sequence[Results]) -> None:
    labels = ["frozen", *(f"bilevel, every {interval}" for interval in INTERVALS)]
    for number, figures in enumerate(costs):
        turns = [ratios_to_plain(figures, interval) for interval in (None, *INTERVALS)]
        middle = [statistics.median(ratio) for ratio in turns]
        below = [m - min(ratio) for m, ratio in zip(middle, turns, strict=True)]
        above = [max(ratio) - m for m, ratio in zip(middle, turns, strict=True)]
        places = [place + 0.4 * number for place in range(len(labels))]
        axes.bar(places, middle, width=0.38, yerr=[below, above], capsize=3, label=_title(figures))
    axes.set_xticks([place + 0.2 for place in range(len(labels))], labels)
    axes.axhline(1, color="0.5", linewidth=0.8)
    axes.set_title("throughput, plain = 1")
    axes.set_ylim(0, 1.35)  # room for the legend
    axes.legend(frameon=False, loc="upper left", ncols=2)


def _draw_memory(axes: Axes, costs: Sequence[Results]) -> None:
    names = {"plain": "plain_step_bytes", "frozen": "weighted_step_bytes", "update": "outer_update_bytes"}
    for number, figures in enumerate(costs):
        places = [place + 0.4 * number for place in range(len(names))]
        axes.bar(places, [figures["peak_memory"][key] / GIB for key in names.values()], width=0.38)
    axes.set_xticks([place + 0.2 for place in range(len(names))], list(names))
    axes.set_title("peak memory of an iteration")
    axes.set_ylabel("GiB")


def _draw_alignments(axes: Axes, alignments: Mapping[str, Sequence[float]]) -> None:
    reference = alignments["fp32 exact, preconditioner adam"]
    for number, way in enumerate(("finite-difference", "exact")):
        axes.plot(reference, alignments[f"bf16 {way}, preconditioner adam"], f"C{number}.", markersize=3, label=way)
    axes.set_title("alignments of samples, Adam-preconditioned")
    axes.set_xlabel("exact, fp32")
    axes.set_ylabel("bf16")
    axes.legend(frameon=False)


def _draw_losses(axes: Axes, curves: Mapping[str, Sequence[Sequence[float]]]) -> None:
    by_arm: dict[str, list[list[float]]] = {}
    for run, points in curves.items():  # by arm and seed, such as bilevel-1
        by_arm.setdefault(run.rpartition("-")[0], []).append([loss for _, loss in points])
    iterations = [iteration for iteration, _ in next(iter(curves.values()))]
    for arm, losses in by_arm.items():
        mean, low, high = ([of(values) for values in zip(*losses, strict=True)] for of in (statistics.mean, min, max))
        axes.plot(iterations, mean, label=arm)
        axes.fill_between(iterations, low, high, alpha=0.2)
    axes.set_xlabel("iterations")
    axes.set_title("loss on held-out target text: mean, range of seeds")
    axes.legend(frameon=False)
