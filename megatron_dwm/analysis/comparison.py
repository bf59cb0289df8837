"""Comparison of a run with one with uniform weights."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dwm.analysis.records import Record, RunRecords
from megatron_dwm.errors import UserError


def training_seconds(steps: Sequence[Record], last_iteration: float = float("inf")) -> float:
    """Return the time of the steps up to an iteration, including all overhead of weighting, without evaluations."""
    return _sum_until(last_iteration, steps, "seconds")


def training_flops(steps: Sequence[Record], last_iteration: float = float("inf")) -> float:
    """Return the operations of the steps up to an iteration, including all overhead of weighting."""
    return _sum_until(last_iteration, steps, "flops")


def _sum_until(last_iteration: float, steps: Sequence[Record], name: str) -> float:
    """Sum a value of the steps up to an iteration, which may lie between two: the part before it counts."""
    return float(sum(step[name] * min(1.0, max(0.0, last_iteration - step["iteration"] + 1)) for step in steps))


def catch_up_iteration(uniform: RunRecords, other: RunRecords) -> float | None:
    """Return the iteration from which ``other``'s evaluation loss stays at or below ``uniform``'s last one.

    The loss is interpolated linearly between evaluations. None if it never falls so far.
    """
    goal = uniform.evaluated("valid")[-1]["lm_loss"]
    curve = [(point["iteration"], point["lm_loss"]) for point in other.evaluated("valid")]
    last_above = max((k for k, (_, loss) in enumerate(curve) if loss > goal), default=-1)
    if last_above == len(curve) - 1:
        return None
    if last_above < 0:
        return float(curve[0][0])
    (before, high), (after, low) = curve[last_above], curve[last_above + 1]
    return float(before + (after - before) * (high - goal) / (high - low))


def catch_up_fractions(uniform: RunRecords, other: RunRecords) -> tuple[float, float] | None:
    """Return when ``other``'s evaluation loss reaches ``uniform``'s last one.

    Returns:
        fractions of uniform's tokens and of its time; None if it never falls so far.
    """
    iteration = catch_up_iteration(uniform, other)
    if iteration is None:
        return None
    seconds = training_seconds(other.steps, iteration) / training_seconds(uniform.steps)
    return iteration / uniform.steps[-1]["iteration"], seconds


def gain_line(uniform: RunRecords, weighted: RunRecords) -> str:
    """Return one line that compares the evaluation losses of two runs of the same length.

    Raises:
        UserError: one of them has no evaluations, or they differ in length.
    """
    for run, name in ((uniform, "--baseline"), (weighted, "--run")):
        if not run.steps or not run.evaluated("valid"):
            raise UserError(f"{name}: a run without evaluations has nothing to compare; train with --eval-iters")
    last = [run.steps[-1]["iteration"] for run in (uniform, weighted)]
    if last[0] != last[1]:
        raise UserError(f"--baseline has {last[0]} iterations and --run {last[1]}; compare runs of the same length")
    before, after = (run.evaluated("valid")[-1]["lm_loss"] for run in (uniform, weighted))
    reached = catch_up_fractions(uniform, weighted)
    line = f"evaluation loss {after:.3f} with weighting and {before:.3f} with uniform weights ({after - before:+.3f})"
    if reached is None:
        return f"{line}; the uniform run's last loss was not reached"
    tokens, seconds = reached
    return f"{line}; the uniform run's last loss after {tokens:.0%} of its tokens and {seconds:.0%} of its time"
