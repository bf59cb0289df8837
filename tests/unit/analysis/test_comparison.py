"""What weighting gained, in one line, of runs made by hand."""

from __future__ import annotations

import pytest

from megatron_dwm.analysis.comparison import catch_up_fractions, gain_line
from megatron_dwm.analysis.records import RunRecords
from megatron_dwm.errors import UserError


def run(losses: list[float], seconds: float = 1.0) -> RunRecords:
    """Ten iterations between evaluations."""
    steps = [{"iteration": number, "seconds": seconds} for number in range(1, 10 * len(losses) + 1)]
    evaluations = [{"split": "valid", "iteration": 10 * (k + 1), "lm_loss": loss} for k, loss in enumerate(losses)]
    return RunRecords(steps, [], evaluations)


def test_tokens_and_time_until_the_uniform_runs_last_loss():
    line = gain_line(run([5.0, 4.0, 3.5, 3.0]), run([5.0, 3.0, 2.5, 2.5], seconds=1.5))
    assert line == (
        "evaluation loss 2.500 with weighting and 3.000 with uniform weights (-0.500); the uniform run's last loss "
        "after 50% of its tokens and 75% of its time"
    )


def test_a_loss_that_is_reached_between_two_steps_costs_part_of_a_step():
    uniform, other = run([5.0, 3.0]), run([5.0, 1.0, 1.0])
    assert catch_up_fractions(uniform, other) == pytest.approx((15 / 20, 15 / 20))
    # Between the evaluations of iterations 10 and 20, three quarters of the way.
    assert catch_up_fractions(run([5.0, 2.0]), other) == pytest.approx((17.5 / 20, 17.5 / 20))


def test_a_loss_that_is_not_reached_is_said():
    assert gain_line(run([5.0, 3.0]), run([5.0, 3.1])).endswith("(+0.100); the uniform run's last loss was not reached")


@pytest.mark.parametrize(
    ("other", "message"), [(run([5.0]), "of the same length"), (RunRecords([{}], [], []), "--run: a run without")]
)
def test_runs_that_cannot_be_compared_are_refused(other: RunRecords, message: str):
    with pytest.raises(UserError, match=message):
        gain_line(run([5.0, 4.0]), other)
