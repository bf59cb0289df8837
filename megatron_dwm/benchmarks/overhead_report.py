"""The figures of ``benchmarks/overhead.py`` as tables, and the bounds that they have to keep."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dwm.benchmarks.gpu_report import ratios_to_plain, update_costs
from megatron_dwm.benchmarks.measuring import median_interval

NOISE = 0.01
"""Relative noise of a ratio of times, over the default number of turns on a quiet machine."""
PARTS = ("training step", "scoring", "target pass", "alignment pass", "parameter copy", "weighter steps", "other")
MIN_BY_INTERVAL = {16: 0.93, 100: 0.985}
"""Throughput of bilevel training against plain training, by the interval between updates."""


@dataclass(frozen=True)
class Target:
    """A figure with the interval of its median, its value computed from operations, and its bound."""

    name: str
    values: Sequence[float]
    """One value per turn."""
    by_operations: float | None = None
    minimum: float | None = None
    maximum: float | None = None

    @property
    def value(self) -> float:
        """The median."""
        return statistics.median(self.values)

    @property
    def is_met(self) -> bool:
        """Whether the figure keeps its bound, if it has one."""
        is_above = self.minimum is None or self.value >= self.minimum
        return is_above and (self.maximum is None or self.value <= self.maximum)

    def __str__(self) -> str:
        low, high = median_interval(self.values)
        spread = f"{low:.4f} to {high:.4f}" if len(self.values) > 1 else ""
        theory = "" if self.by_operations is None else f"{self.by_operations:.4f}"
        bound, outcome = "", ""
        if self.minimum is not None or self.maximum is not None:
            bound = f">= {self.minimum:g}" if self.minimum is not None else f"<= {self.maximum:g}"
            outcome = "met" if self.is_met else "NOT MET"
        return f"{self.name:58} {self.value:8.4f}   {spread:18} {theory:>9}   {bound:9} {outcome}".rstrip()


HEAD = f"{'':58} {'median':>8}   {'95 % interval':18} {'by op.s':>9}   {'to reach':9}"


def targets(figures: dict[str, Any]) -> list[Target]:
    """Return what weighting costs: throughput, time of an update and its parts, memory."""
    turns, passes, memory = figures["turns"], figures["passes"], figures["peak_memory"]
    step, update = operations_of(figures)
    plain = figures["operations"]["training step"]
    bare = [alone / ours for ours, alone in zip(turns["plain"], turns["bare"], strict=True)]
    align = [a / b for a, b in zip(passes["alignment pass"], passes["forward-backward"], strict=True)]
    copy_of_parameters = memory["parameter_copy_bytes"]

    def in_copies(name: str) -> list[float]:
        return [memory[f"{name}_bytes"] / copy_of_parameters]

    return [
        Target("plain against bare megatron-core, throughput", bare, minimum=1 - NOISE),
        Target("frozen against plain, throughput", ratios_to_plain(figures, None), plain / step, minimum=0.995),
        *(
            Target(
                f"bilevel against plain, throughput, an update every {interval}",
                ratios_to_plain(figures, interval),
                plain * interval / (step * interval + update),
                minimum=MIN_BY_INTERVAL.get(interval),
            )
            for interval in figures["intervals"]
        ),
        Target("an update, in plain steps", update_costs(figures), update / plain, maximum=1.25),
        Target("alignment pass against forward-backward, time", align, figures["operations"]["alignment pass"] / plain),
        Target("weighter's parameters against the model's", [figures["weighter_part"]], maximum=0.02),
        Target(
            "update above plain, in parameter + gradient copies", [memory["outer_update_above_plain_copies"]], maximum=1
        ),
        Target("update above plain, in parameter copies", in_copies("outer_update_above_plain")),
        Target("weighted step above plain, in parameter copies", in_copies("weighted_step_above_plain"), maximum=0.001),
        Target("left by an update, in parameter copies", in_copies("retained_after_update"), maximum=0.001),
    ]


def operations_of(figures: dict[str, Any]) -> tuple[float, float]:
    """Return the operations of a weighted step, and those that an update adds to one."""
    parts = figures["operations"]
    step = parts["training step"] + parts["scoring"]
    return step, sum(parts.values()) - step


def table(figures: dict[str, Any]) -> str:
    """Return the figures of one run as tables."""
    lines = ["", f"{'mode':18} {'ms a step':>10} {'tokens/s':>10} {'of plain':>9}"]
    times, plain = figures["step_seconds"], figures["plain_tokens_per_s"]
    ratios = {"bare": 1 / figures["bare_ratio"], "frozen": figures["frozen_ratio"], "bilevel": figures["bilevel_ratio"]}
    for mode, spent in times.items():
        ratio = ratios.get(mode, times["plain"] / spent)
        speed = plain * times["plain"] / spent
        lines.append(f"{mode:18} {1000 * spent:10.1f} {speed:10.0f} {ratio:9.4f}")
    if (direct := figures["bilevel_ratio_of_whole_intervals"]) is not None:
        lines.append(f"{'whole intervals':18} {'':21} {direct:9.4f}")
    fractions = figures["shares"]
    lines += ["", f"{'part of a bilevel run':24} {'measured':>9} {'by operations':>14}"]
    lines += [f"{part:24} {fractions['measured'][part]:9.4f} {fractions['theoretical'][part]:14.4f}" for part in PARTS]
    memory = figures["peak_memory"]
    lines += ["", f"{'memory':34} {'MiB':>10} {'parameter copies':>17} {'gradient copies':>16}"]
    for name, value in memory.items():
        if name.endswith("_bytes"):
            of = [value / memory[f"{kind}_copy_bytes"] for kind in ("parameter", "gradient")]
            label = name.removesuffix("_bytes").replace("_", " ")
            lines.append(f"{label:34} {value / 2**20:10.2f} {of[0]:17.4f} {of[1]:16.4f}")
    if not memory["exact"]:
        lines.append("too high: messages that gloo's threads free are not seen; measure one process, or GPUs")
    counts = figures["device_counts"]
    lines += ["", f"{'what the host asks of the device':34} {' '.join(f'{name:>17}' for name in counts['plain'])}"]
    lines += [f"{mode:34} {' '.join(f'{n:17d}' for n in found.values())}" for mode, found in counts.items()]
    return "\n".join([*lines, "", *cost_lines(figures)])


def cost_lines(figures: dict[str, Any]) -> list[str]:
    """Return what weighting costs, line by line, under the batch's sizes."""
    sizes = (
        f"micro-batch size {figures['micro_batch_size']}, batch {figures['global_batch_size']}, target batch "
        f"{figures['target_batch_size']}"
    )
    clock = "wall time" if figures["clock"] == "wall" else "time of the processor"
    return [f"{sizes}; {clock}", HEAD, *map(str, targets(figures))]
