"""The figures of benchmarks/benefit.py, from made-up records and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dwm.analysis.comparison import catch_up_fractions
from megatron_dwm.analysis.records import RunRecords
from megatron_dwm.benchmarks.benefit_report import Arm, interval, summary, table
from megatron_dwm.benchmarks.mixture import CORPORA, CorpusName, write_archives
from megatron_dwm.benchmarks.sweep_report import best_arm, sweep_summary, sweep_table


def run(losses: list[float], *, seconds: float = 1.0) -> RunRecords:
    """A run of 10 iterations for each evaluation loss; the test loss is the last of them."""
    steps = [
        {"iteration": i + 1, "seconds": seconds, "flops": 2 * seconds, "consumed_samples": 4 * (i + 1)}
        for i in range(10 * len(losses))
    ]
    points = [{"iteration": 10 * (k + 1), "split": "valid", "lm_loss": loss} for k, loss in enumerate(losses)]
    points.append({"iteration": 10 * len(losses), "split": "test", "lm_loss": losses[-1]})
    return RunRecords(steps, [], points)


UNIFORM = run([5.0, 4.0, 3.5, 3.0])


def test_catching_up_is_found_between_evaluations():
    tokens, time = catch_up_fractions(UNIFORM, run([4.5, 3.5, 2.5, 2.0], seconds=1.2)) or (0, 0)
    assert tokens == pytest.approx(25 / 40)  # 3.0 lies halfway from 3.5 to 2.5
    assert time == pytest.approx(25 * 1.2 / 40)


def test_a_loss_that_rises_again_has_not_caught_up():
    tokens, _ = catch_up_fractions(UNIFORM, run([2.9, 3.4, 3.2, 2.8])) or (0, 0)
    assert tokens == pytest.approx(35 / 40)


def test_a_run_that_stays_worse_never_catches_up():
    assert catch_up_fractions(UNIFORM, run([5.0, 4.0, 3.5, 3.1])) is None


def test_the_summary_compares_means_over_seeds():
    arms = [
        Arm("uniform", [UNIFORM, run([5.0, 4.0, 3.6, 3.2])]),
        Arm("bilevel", [run([4.5, 3.5, 2.5, 2.0]), run([4.6, 3.6, 2.8, 2.6])]),
        Arm("oracle", [run([3.0, 2.0, 1.5, 1.0]), run([3.0, 2.0, 1.5, 1.2])]),
    ]
    result = summary(arms, sequence=8)
    assert result["arms"]["bilevel"] == {"test_loss": [2.0, 2.6], "tokens": 160 * 8, "seconds": [40.0, 40.0]}
    assert result["gap_closed"] == pytest.approx((3.1 - 2.3) / (3.1 - 1.1))
    assert result["token_ratio"] == pytest.approx((25 / 40 + 25 / 40) / 2)
    assert "0.40 of the gap" in table(arms, result)


def test_an_oracle_that_is_worse_than_uniform_leaves_no_gap():
    losses = {"bilevel": [4.5, 3.5, 2.5, 2.0], "oracle": [5.0, 4.5, 4.2, 4.0]}
    arms = [Arm("uniform", [UNIFORM]), *(Arm(name, [run(values)]) for name, values in losses.items())]
    result = summary(arms, sequence=8)
    assert result["gap_closed"] is None and "of the gap" not in table(arms, result)
    assert result["token_ratio"] == pytest.approx(25 / 40)


def test_a_sweep_compares_each_arm_at_its_own_best_rate():
    by_factor = {
        1.0: [
            Arm("uniform", [run([5.0, 4.0, 3.6, 3.2]), run([5.0, 4.0, 3.6, 3.4])]),
            Arm("bilevel", [run([5.0, 3.8, 3.3, 3.1]), run([5.0, 3.8, 3.6, 3.5])]),
        ],
        2.0: [
            Arm("uniform", [UNIFORM, run([5.0, 4.0, 3.4, 3.0])]),
            Arm("bilevel", [run([4.5, 3.5, 2.5, 2.0], seconds=1.2), run([4.5, 3.5, 2.5, 2.4], seconds=1.2)]),
        ],
    }
    result = sweep_summary(by_factor, sequence=8)
    assert result["best"] == {"uniform": 2.0, "bilevel": 2.0} and result["tokens"] == 160 * 8
    assert result["arms"]["bilevel"]["2"]["flops"] == pytest.approx([96.0, 96.0])
    found = result["against_uniform"]["bilevel"]
    assert found["test_loss_difference"] == pytest.approx([-1.0, -0.6])
    assert found["token_ratio"] == pytest.approx(25 / 40) and found["time_ratio"] == pytest.approx(30 / 40)
    assert found["flop_ratio"] == pytest.approx(30 / 40)
    assert found["worse_at"] == [[1.0, 2]]
    assert "x 1, 2" in sweep_table(by_factor, result)
    # With the best rate of the one only, uniform would look better or worse than it is.
    assert best_arm({1.0: by_factor[1.0]}, "uniform").test_losses == [3.2, 3.4]


def test_archives_hold_every_source_alike_and_no_document_twice(tmp_path: Path):
    for source in ("good", "bad"):
        lines = [json.dumps({"text": f"{source} {number}"}) for number in range(40)]
        (tmp_path / f"{source}.train.jsonl").write_text("".join(line + "\n" for line in lines))
    write_archives(tmp_path, {"first": ("good", "bad"), "second": ("good", "bad")})
    texts = {
        name: [json.loads(line)["text"] for line in (tmp_path / f"{name}.train.jsonl").open()]
        for name in ("first", "second")
    }
    assert len(set(texts["first"]) | set(texts["second"])) == 80
    for found in texts.values():
        assert sum(text.startswith("good") for text in found) == 20 == len(found) / 2
        assert found != sorted(found)


def test_what_the_arms_do_not_give_is_null():
    result = summary([Arm("uniform", [UNIFORM])], sequence=8)
    assert (result["gap_closed"], result["token_ratio"], result["time_ratio"]) == (None, None, None)


def test_the_interval_is_students():
    # Standard deviation 0.1, three values: 4.30 * 0.1 / sqrt(3).
    assert interval([1.0, 1.1, 1.2]) == "1.1000 ± 0.2483"


@pytest.mark.parametrize("name", ["documentation", "speeches", "scripture", "glosses", "genres", "archives"])
def test_a_mixture_of_packages_is_of_those_it_names(name: CorpusName):
    recipe = CORPORA[name]
    packages = {spec.partition(":")[2] for spec in recipe.flags[1:]}
    made = {source for sources in recipe.archives.values() for source in sources}
    assert packages == (made or set(recipe.train)) and recipe.target in packages
    assert sum(recipe.train.values()) == pytest.approx(1)
