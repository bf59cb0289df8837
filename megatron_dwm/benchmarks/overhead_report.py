"""The figures of ``benchmarks/overhead.py`` as a table, and the bounds that they have to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NOISE = 0.01
"""Of a ratio of times, over the default number of turns on a quiet machine."""
PARTS = ("training step", "scoring", "target pass", "alignment pass", "parameter copy", "weighter steps", "other")


@dataclass(frozen=True)
class Target:
    """A figure and its bound."""

    name: str
    value: float
    least: float | None = None
    most: float | None = None

    @property
    def is_met(self) -> bool:
        """Whether the figure keeps its bound."""
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)

    def __str__(self) -> str:
        bound = f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"
        return f"{self.name:60} {self.value:8.4f}   {bound:8}   {'met' if self.is_met else 'NOT MET'}"


def targets(figures: dict[str, Any]) -> list[Target]:
    """Return the figures that have a bound."""
    memory = figures["peak_memory"]
    copy_of_parameters = memory["parameter_copy_bytes"]
    between = memory["weighted_step_above_plain_bytes"] / copy_of_parameters
    left = memory["retained_after_update_bytes"] / copy_of_parameters
    return [
        Target("plain against bare megatron-core, throughput", figures["bare_ratio"], least=1 - NOISE),
        Target("bilevel against plain, throughput", figures["bilevel_ratio"], least=0.97),
        Target("the same by operations", figures["theoretical_bilevel_ratio"], least=0.97),
        Target("weighter's parameters against the model's", figures["weighter_part"], most=0.02),
        Target("alignment pass against forward-backward, time", figures["alignment_pass_ratio"], most=1.05),
        Target("update above plain, in parameter + gradient copies", memory["outer_update_above_plain_copies"], most=1),
        Target("weighted step above plain, in parameter copies", between, most=0.001),
        Target("left by an update, in parameter copies", left, most=0.001),
    ]


def table(figures: dict[str, Any]) -> str:
    """Return all figures as a table."""
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
    micro = figures["alignment_pass_ratio_at_micro_batch_size"]
    lines += ["", f"alignment pass against forward-backward at the run's own micro-batch size: {micro:.4f}", ""]
    return "\n".join([*lines, *map(str, targets(figures))])
