"""The sentences at the top of the page: the most important figures of a run, and contradictions among them."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np

from megatron_dwm.analysis.preference import source_alignments
from megatron_dwm.analysis.report.content import Report
from megatron_dwm.analysis.uncertainty import MIN_UPDATES, Estimate

_MIN_WEIGHT_DIFFERENCE = 0.05
"""Difference of two sources' mean weights from which a contradiction is reported; smaller ones have little effect."""
_MAX_SENTENCES = 3


class Fact(NamedTuple):
    """A figure at the top of the page."""

    title: str
    value: str
    explanation: str


def key_facts(report: Report) -> list[Fact]:
    """Return the most important figures, those of the last stage whose batches were weighted."""
    facts = []
    weighted = [stage for stage, found in report.sources.items() if stage > 0 and found]
    if weighted:
        last = weighted[-1]
        by_weight = sorted(
            (found.weight, name) for name, found in report.sources[last].items() if found.weight is not None
        )
        extremes = (("counts most", by_weight[-1]), ("counts least", by_weight[0])) if len(by_weight) > 1 else ()
        for title, (weight, name) in extremes:
            first = report.sources[weighted[0]][name].weight
            before = f", {first:.2f} in stage {weighted[0]}" if first is not None and weighted[0] != last else ""
            facts.append(Fact(title, name, f"mean weight {weight:.2f} in stage {last}{before}"))
    sizes = report.run.step_series("effective_sample_size").values
    if sizes:
        tail = sizes[-max(1, len(sizes) // 4) :]
        value = f"{100 * np.mean(tail):.0f} %"
        facts.append(Fact("effective sample size", value, "of the batch, in the last quarter of the weighted steps"))
    if len(report.samples):
        last = report.samples.stages[-1]
        found = {name: by_stage[last].in_batch for name, by_stage in report.correlations.items()}
        known = [(rho, name) for name, rho in found.items() if name != "alignment" and rho.excludes_zero]
        if known:
            rho, name = max(known, key=lambda pair: abs(pair[0].value or 0.0))
            text = f"rank correlation {format_estimate(rho)} with the weight in stage {last}"
            facts.append(Fact("goes most with", report.properties[name].label, text))
        rho = found["alignment"]
        if rho.value is not None:
            value = format_signed(rho.value) if rho.is_known else "too few updates"
            text = f"rank correlation {format_estimate(rho)} in stage {last}"
            facts.append(Fact("agrees with alignment", value, text))
    return facts


def warnings(report: Report) -> list[str]:
    """Return a sentence for each contradiction between weights and alignments, and for stages with few updates."""
    found = []
    few = [str(stage) for stage, number in _all_updates(report).items() if number < MIN_UPDATES]
    if few:
        found.append(
            f"Too few updates to say what the weighter prefers in stage{'s' * (len(few) > 1)} {', '.join(few)}: "
            f"under {MIN_UPDATES} each. No intervals are given there, and no running means."
        )
    if len(report.samples):
        last = report.samples.stages[-1]
        rho = report.correlations["alignment"][last].in_batch
        if rho.is_known and not rho.excludes_zero:
            found.append(
                f"In stage {last} the weights do not follow the alignments: their rank correlation within a batch is "
                f"{format_estimate(rho)}, which cannot be distinguished from 0."
            )
        elif rho.is_known and (rho.value or 0.0) < 0:
            found.append(
                f"In stage {last} the weights run against the alignments: their rank correlation within a batch is "
                f"{format_estimate(rho)}."
            )
        found += _contradictions(report, last)
    return found


def _contradictions(report: Report, stage: int) -> list[str]:
    """Return a sentence for pairs of sources of which the one with lower alignment has the higher weight.

    Many pairs are compared: the intervals allow for it, or chance alone would contradict.
    """
    in_stage = report.all_samples.select(report.all_samples.stage == stage)
    aligned = source_alignments(in_stage, report.run.sources)
    figures = report.sources.get(stage, {})
    pairs: list[tuple[float, str]] = []
    compared = list(combinations([name for name in figures if figures[name].alignment.is_known], 2))
    for one, other in compared:
        difference = aligned.difference(one, other, len(compared))
        first, second = figures[one].weight, figures[other].weight
        if not difference.excludes_zero or first is None or second is None:
            continue
        low, high = (one, other) if (difference.value or 0.0) < 0 else (other, one)
        low_weight, high_weight = (first, second) if low == one else (second, first)
        if low_weight - high_weight < _MIN_WEIGHT_DIFFERENCE:
            continue
        values = [format_signed(figures[name].alignment.value) for name in (low, high)]
        gap = abs(difference.value or 0.0)
        half = (difference.high or 0.0) - (difference.value or 0.0)
        pairs.append(
            (
                gap,
                f"Weights contradict alignments in stage {stage}: {low} is less aligned with the target than {high} "
                f"({values[0]} against {values[1]} standard deviations; difference {gap:.2f} ± "
                f"{half:.2f}, n = {difference.n} updates), yet it has the higher weight ({low_weight:.2f} against "
                f"{high_weight:.2f}). The weighter learns slowly, from past updates too; what it sees of a text may "
                "also not distinguish these sources.",
            )
        )
    return [sentence for _, sentence in sorted(pairs, reverse=True)[:_MAX_SENTENCES]]


def _all_updates(report: Report) -> dict[int, int]:
    """Return the number of outer updates of each stage."""
    stages = [update["stage"] for update in report.run.updates]
    return {stage: stages.count(stage) for stage in dict.fromkeys(stages)}


def format_estimate(estimate: Estimate) -> str:
    """Return a figure with its interval and number of values, or the reason why it has none."""
    if estimate.value is None:
        return "none: all values are equal"
    counted = f"n = {estimate.n:,} {estimate.unit}"
    if not estimate.is_known:
        return f"too few updates ({counted})"
    value, low, high = (format_signed(number) for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high}, {counted})"


def format_signed(value: float | None) -> str:
    """Return a number with a sign and two digits; a dash of None."""
    if value is None or np.isnan(value):
        return "\N{EN DASH}"
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "\N{MINUS SIGN}")
