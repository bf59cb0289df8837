"""The figures of ``benchmarks/benefit.py --sweep``: each weighting at its own best learning rate."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_dwm.analysis.comparison import catch_up_iteration, training_flops, training_seconds
from megatron_dwm.analysis.records import RunRecords
from megatron_dwm.benchmarks.benefit_report import Arm, interval

ByFactor = Mapping[float, Sequence[Arm]]
"""Arms by the factor of the learning rate; the same arms for each."""


def sweep_summary(by_factor: ByFactor, sequence: int) -> dict[str, Any]:
    """Return what ``--json`` writes.

    ``best`` is the factor at which an arm's mean last evaluation loss is least. ``token_ratio``, ``time_ratio`` and
    ``flop_ratio`` are what an arm at its best needs, as fractions of what uniform took at its best, until its
    evaluation loss stays at or below uniform's last one: means over the seeds, null if a seed does not reach it.
    ``worse_at`` lists factor and seed where an arm's test loss is above uniform's at the same factor.

    Args:
        by_factor: the runs.
        sequence: tokens of a sample.
    """
    names = [arm.name for arm in next(iter(by_factor.values()))]
    result: dict[str, Any] = {
        "tokens": _arm(by_factor[1.0], names[0]).samples * sequence,
        "arms": {
            name: {
                f"{factor:g}": {
                    "test_loss": _arm(arms, name).test_losses,
                    "valid_loss": _last_evaluations(_arm(arms, name)),
                    "seconds": _arm(arms, name).seconds,
                    "flops": [training_flops(run.steps) for run in _arm(arms, name).runs],
                }
                for factor, arms in by_factor.items()
            }
            for name in names
        },
        "best": {name: _best_factor(by_factor, name) for name in names},
        "against_uniform": {},
    }
    if "uniform" in names:
        uniform = best_arm(by_factor, "uniform")
        others = [name for name in names if name != "uniform"]
        result["against_uniform"] = {name: _against(by_factor, uniform, name) for name in others}
    return result


def best_arm(by_factor: ByFactor, name: str) -> Arm:
    """Return the arm at the learning rate that is best for it."""
    return _arm(by_factor[_best_factor(by_factor, name)], name)


def sweep_table(by_factor: ByFactor, result: dict[str, Any]) -> str:
    """Return a table of test losses by learning rate, and one of the best against uniform's best."""
    factors = list(by_factor)
    lines = [f"{'arm':<18}" + "".join(f"{f'lr x {factor:g}':<20}" for factor in factors) + "best"]
    for name, found in result["arms"].items():
        cells = (interval(found[f"{factor:g}"]["test_loss"]) for factor in factors)
        lines.append(f"{name:<18}" + "".join(f"{cell:<20}" for cell in cells) + f"{result['best'][name]:g}")
    if result["against_uniform"]:
        lines.append(f"\n{'best against best':<18}{'minus uniform':<20}tokens  time  FLOPs   worse at (lr, seed)")
    for name, found in result["against_uniform"].items():
        ratios = [found[key] for key in ("token_ratio", "time_ratio", "flop_ratio")]
        parts = "  ".join("never" if ratio is None else f"{ratio:.2f} " for ratio in ratios)
        worse = ", ".join(f"x {factor:g}, {seed}" for factor, seed in found["worse_at"]) or "none"
        lines.append(f"{name:<18}{interval(found['test_loss_difference']):<20}{parts}   {worse}")
    return "\n".join(lines)


def _against(by_factor: ByFactor, uniform: Arm, name: str) -> dict[str, Any]:
    arm = best_arm(by_factor, name)
    pairs = list(zip(uniform.runs, arm.runs, strict=True))
    ratios = [_ratios(plain, weighted) for plain, weighted in pairs]
    reached = [ratio for ratio in ratios if ratio is not None]
    tokens, seconds, flops = (
        [statistics.mean(values) for values in zip(*reached, strict=True)] if len(reached) == len(pairs) else [None] * 3
    )
    worse = [
        [factor, seed]
        for factor, arms in by_factor.items()
        for seed, (here, there) in enumerate(
            zip(_arm(arms, name).test_losses, _arm(arms, "uniform").test_losses, strict=True), start=1
        )
        if here > there
    ]
    return {
        "test_loss_difference": [a - b for a, b in zip(arm.test_losses, uniform.test_losses, strict=True)],
        "token_ratio": tokens,
        "time_ratio": seconds,
        "flop_ratio": flops,
        "worse_at": worse,
    }


def _ratios(uniform: RunRecords, other: RunRecords) -> tuple[float, float, float] | None:
    """Return the fractions of uniform's tokens, seconds and operations until ``other`` has its loss."""
    iteration = catch_up_iteration(uniform, other)
    if iteration is None:
        return None
    seconds = training_seconds(other.steps, iteration) / training_seconds(uniform.steps)
    flops = training_flops(other.steps, iteration) / training_flops(uniform.steps)
    return iteration / uniform.steps[-1]["iteration"], seconds, flops


def _best_factor(by_factor: ByFactor, name: str) -> float:
    return min(by_factor, key=lambda factor: statistics.mean(_last_evaluations(_arm(by_factor[factor], name))))


def _last_evaluations(arm: Arm) -> list[float]:
    return [run.evaluated("valid")[-1]["lm_loss"] for run in arm.runs]


def _arm(arms: Sequence[Arm], name: str) -> Arm:
    return next(arm for arm in arms if arm.name == name)
