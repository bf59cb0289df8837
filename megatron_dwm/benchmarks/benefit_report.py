"""The results of ``benchmarks/benefit.py``: numbers, a table and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_dwm.analysis.comparison import catch_up_fractions, training_flops, training_seconds
from megatron_dwm.analysis.records import RunRecords

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
"""Student's t of n - 1 degrees of freedom, two-sided 95 %, by n."""
T_95_MORE = 2.31
"""That of 9 values, used for more values too: it makes their intervals wider than necessary, not narrower."""


@dataclass(frozen=True)
class Arm:
    """The runs of one weighting, by seed."""

    name: str
    runs: list[RunRecords]

    @property
    def test_losses(self) -> list[float]:
        """The last test loss of each run, in nats per token."""
        return [run.evaluated("test")[-1]["lm_loss"] for run in self.runs]

    @property
    def seconds(self) -> list[float]:
        """Training time of each run, with all that the weighting costs, without evaluations."""
        return [training_seconds(run.steps) for run in self.runs]

    @property
    def samples(self) -> int:
        """Training samples of a run."""
        return int(self.runs[0].steps[-1]["consumed_samples"])


def summary(arms: Sequence[Arm], sequence: int) -> dict[str, Any]:
    """Return what ``--json`` writes; a ratio that the arms do not give is null.

    ``gap_closed``: the fraction of the mean test loss from uniform to oracle that bilevel gains; null if the oracle is
    no better than uniform, so that there is no gap. ``token_ratio`` and ``time_ratio``: tokens and training seconds, as
    fractions of uniform's, after which bilevel's evaluation loss stays at or below uniform's last one; mean over the
    seeds, null if a seed does not reach it.

    Args:
        arms: the runs of each weighting.
        sequence: tokens of a sample.
    """
    by_name = {arm.name: arm for arm in arms}
    losses = {name: statistics.mean(arm.test_losses) for name, arm in by_name.items()}
    gap = tokens = seconds = None
    if {"uniform", "bilevel", "oracle"} <= losses.keys() and losses["oracle"] < losses["uniform"]:
        gap = (losses["uniform"] - losses["bilevel"]) / (losses["uniform"] - losses["oracle"])
    if {"uniform", "bilevel"} <= losses.keys():
        pairs = list(zip(by_name["uniform"].runs, by_name["bilevel"].runs, strict=True))
        ratios = [catch_up_fractions(uniform, bilevel) for uniform, bilevel in pairs]
        reached = [ratio for ratio in ratios if ratio is not None]
        if len(reached) == len(pairs):
            tokens = statistics.mean(ratio[0] for ratio in reached)
            seconds = statistics.mean(ratio[1] for ratio in reached)
    return {
        "arms": {
            arm.name: {"test_loss": arm.test_losses, "tokens": arm.samples * sequence, "seconds": arm.seconds}
            for arm in arms
        },
        "gap_closed": gap,
        "token_ratio": tokens,
        "time_ratio": seconds,
    }


def table(arms: Sequence[Arm], result: dict[str, Any]) -> str:
    """Return a table of means with 95 % intervals; differences are taken seed by seed."""
    uniform = next((arm.test_losses for arm in arms if arm.name == "uniform"), None)
    width = max(len(arm.name) for arm in arms)
    lines = [f"{'arm':<{width}} test loss            minus uniform        seconds"]
    for arm in arms:
        difference = ""
        if uniform is not None and arm.name != "uniform":
            difference = interval([a - b for a, b in zip(arm.test_losses, uniform, strict=True)])
        mean_seconds = statistics.mean(arm.seconds)
        lines.append(f"{arm.name:<{width}} {interval(arm.test_losses):<20} {difference:<20} {mean_seconds:.0f}")
    for name, meaning in (
        ("gap_closed", "of the gap from uniform to oracle closed by bilevel"),
        ("token_ratio", "of uniform's tokens until bilevel has its loss"),
        ("time_ratio", "of uniform's time until bilevel has its loss"),
    ):
        value = result[name]
        if value is None and name == "gap_closed":  # there is no oracle, no bilevel or no gap
            continue
        lines.append(f"{'not reached' if value is None else format(value, '.2f')} {meaning}")
    return "\n".join(lines)


def interval(values: Sequence[float]) -> str:
    """Return the mean and half the width of its 95 % interval by Student's t."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    t = T_95.get(len(values), T_95_MORE)
    return f"{statistics.mean(values):.4f} ± {t * statistics.stdev(values) / len(values) ** 0.5:.4f}"


def loss_curve(arm: Arm) -> tuple[list[int], list[float], list[float], list[float]]:
    """Return the iterations of an arm's evaluations, and the mean, least and largest loss of its seeds there."""
    iterations = [point["iteration"] for point in arm.runs[0].evaluated("valid")]
    curves = [[point["lm_loss"] for point in run.evaluated("valid")] for run in arm.runs]
    mean, low, high = ([of(losses) for losses in zip(*curves, strict=True)] for of in (statistics.mean, min, max))
    return iterations, mean, low, high


def figure(arms: Sequence[Arm], sequence: int) -> Figure:
    """Draw the evaluation loss of each arm over tokens, time and operations: mean of the seeds, and their range."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(14, 4.5), layout="constrained")
    over_tokens, over_time, over_flops = drawing.subplots(1, 3, sharey=True)
    for number, arm in enumerate(arms):
        iterations, mean, low, high = loss_curve(arm)
        per_iteration = arm.samples * sequence / arm.runs[0].steps[-1]["iteration"]
        seconds, flops = (
            [statistics.mean(cost(run.steps, iteration) for run in arm.runs) for iteration in iterations]
            for cost in (training_seconds, training_flops)
        )
        color = f"C{number}"
        over_tokens.plot([i * per_iteration / 1e6 for i in iterations], mean, color=color, label=arm.name)
        over_tokens.fill_between([i * per_iteration / 1e6 for i in iterations], low, high, color=color, alpha=0.15)
        over_time.plot(seconds, mean, color=color)
        over_flops.plot([value / 1e12 for value in flops], mean, color=color)
    over_tokens.set_xlabel("million tokens")
    over_tokens.set_ylabel("loss on held-out text like the target (nats per token)")
    over_time.set_xlabel("seconds of training, all overhead included")
    over_flops.set_xlabel("10¹² floating-point operations, all overhead included")
    over_tokens.legend(frameon=False)
    return drawing
