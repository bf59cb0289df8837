"""Statistics of recorded weights against values computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_dwm.analysis.page import Example, key_facts, make_report, read_benefit, tint, write_page
from megatron_dwm.analysis.preference import (
    correlation_within,
    correlations,
    distinct,
    evenly_spaced_updates,
    extremes,
    quarters,
    rank_correlation,
    ranks,
    stage_sources,
    standardized,
    tfidf_similarity,
    weight_quantiles,
    weighted_samples,
)
from megatron_dwm.analysis.records import Record, RunRecords
from megatron_dwm.errors import UserError


def update(iteration: int, stage: int, weights: list[float], alignments: list[float], **columns: list) -> Record:
    first = 10 * iteration
    samples = {
        "index": list(range(first, first + len(weights))),
        "source": ["a", "b"] * (len(weights) // 2),
        "weight": weights,
        "alignment": alignments,
        **columns,
    }
    return {
        "kind": "outer_update",
        "iteration": iteration,
        "stage": stage,
        "target_loss": 2.0,
        "samples": samples,
    }


def test_samples_of_updates_become_rows_with_alignments_standardized_in_their_batch():
    samples = weighted_samples([update(3, 1, [0.5, 1.5], [1.0, 3.0]), update(5, 2, [1.2, 0.8], [10.0, 10.0])])
    assert samples.iteration.tolist() == [3, 3, 5, 5] and samples.stages == [1, 2]
    assert samples.index.tolist() == [30, 31, 50, 51] and samples.source.tolist() == ["a", "b", "a", "b"]
    assert samples.alignment.tolist() == [-1.0, 1.0, 0.0, 0.0]
    assert samples.properties == {}
    assert len(weighted_samples([])) == 0 and standardized([]).tolist() == []


def test_losses_are_a_property_if_every_record_has_them():
    with_loss = update(3, 1, [0.5, 1.5], [1.0, 3.0], loss=[2.5, 3.5])
    assert weighted_samples([with_loss]).properties["loss"].tolist() == [2.5, 3.5]
    assert "loss" not in weighted_samples([with_loss, update(5, 1, [1.0, 1.0], [0.0, 1.0])]).properties


def test_whole_updates_are_chosen_evenly_in_each_stage():
    updates = [update(i, 1 + (i > 5), [1.0, 1.0], [0.0, 1.0]) for i in range(1, 10)]
    assert [u["iteration"] for u in evenly_spaced_updates(updates, 6)] == [1, 3, 5, 6, 8, 9]
    assert [u["iteration"] for u in evenly_spaced_updates(updates, 1)] == [1, 6]
    assert evenly_spaced_updates(updates, 1000) == updates


def test_figures_by_source_count_every_sample_once():
    # 10 samples a step. Warm-up: 5 of a. Stage 1: 4 of a with weight 2, then 8 of a with weight 0.5.
    steps = [
        {"stage": 0, "share_by_source": {"a": 0.5, "b": 0.5}},
        {"stage": 1, "share_by_source": {"a": 0.8, "b": 0.2}, "weight_by_source": {"a": 2.0, "b": 1 / 3}},
        {"stage": 1, "share_by_source": {"a": 0.4, "b": 0.6}, "weight_by_source": {"a": 0.5, "b": 3.0}},
    ]
    samples = weighted_samples([update(2, 1, [1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 0.0, 2.0])])
    found = stage_sources(steps, samples)
    assert found[0]["a"].weight == 1.0 and found[0]["a"].alignment is None
    assert found[1]["a"].weight == pytest.approx((4 * 2.0 + 8 * 0.5) / 12)
    assert found[1]["b"].weight == pytest.approx((6 / 3 + 2 * 3.0) / 8)
    assert found[1]["a"].loss_fraction == pytest.approx(0.6) and found[1]["a"].sample_fraction == pytest.approx(0.6)
    assert found[1]["a"].alignment == -1.0 and found[1]["b"].alignment == 1.0


def test_a_source_that_is_absent_has_no_weight():
    found = stage_sources(
        [{"stage": 1, "share_by_source": {"a": 1.0}}, {"stage": 2, "share_by_source": {"b": 1.0}}], weighted_samples([])
    )
    assert found[2]["a"].weight is None and found[2]["a"].loss_fraction == 0.0 and found[1]["a"].weight == 1.0


def test_equal_values_share_the_mean_of_their_ranks():
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_rank_correlation_by_hand():
    first = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert rank_correlation(first, np.exp(first)) == pytest.approx(1.0)
    assert rank_correlation(first, -first) == pytest.approx(-1.0)
    # 1 - 6 Σ d² / (n (n² - 1)) with d = 1, 1, 1, 1, 0.
    assert rank_correlation(first, np.array([2.0, 1.0, 4.0, 3.0, 5.0])) == pytest.approx(1 - 6 * 4 / (5 * 24))
    # Ties: ranks (1, 2.5, 2.5, 4) against (1, 2, 3, 4): cov 1.125, variances 1.125 and 1.25.
    tied = rank_correlation(np.array([0.0, 1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert tied == pytest.approx(1.125 / math.sqrt(1.125 * 1.25))


def test_no_rank_correlation_with_what_does_not_vary_or_is_not_known():
    first, nothing = np.array([1.0, 2.0, 3.0]), np.full(3, np.nan)
    assert rank_correlation(first, np.ones(3)) is None and rank_correlation(first, nothing) is None
    assert rank_correlation(np.array([1.0, np.nan, 2.0]), np.array([5.0, 0.0, 4.0])) == pytest.approx(-1.0)


def test_correlation_within_groups_counts_them_by_size_and_leaves_out_those_without_one():
    groups = np.array(["x"] * 2 + ["y"] * 4 + ["z"] * 3)
    first = np.array([1.0, 2, 1, 2, 3, 4, 1, 2, 3])
    second = np.array([1.0, 2, 4, 3, 2, 1, 7, 7, 7])
    assert correlation_within(groups, first, second) == pytest.approx((2 * 1 - 4 * 1) / 6)
    assert correlation_within(groups[6:], first[6:], second[6:]) is None


def test_correlations_are_taken_within_batches_and_within_sources():
    # In both batches the higher weight has the higher value; over batches, within a source, it is the other way round.
    samples = weighted_samples([update(1, 1, [0.5, 1.5], [0.0, 1.0]), update(2, 1, [0.4, 1.4], [0.0, 1.0])])
    found = correlations(samples, np.array([1.0, 2.0, 3.0, 4.0]))
    assert found[1].in_batch == pytest.approx(1.0) and found[1].in_source == pytest.approx(-1.0)


def test_quarters_by_hand():
    values, weights = np.arange(8.0), np.array([1.0, 1, 2, 2, 3, 3, 4, 6])
    found = quarters(values, weights)
    assert [(q.low, q.high) for q in found] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert [q.weight for q in found] == [1, 2, 3, 5] and {q.fraction for q in found} == {0.25}


def test_few_different_values_are_a_part_each():
    found = quarters(np.array([64.0, 64, 63, 64, np.nan]), np.array([1.0, 2, 5, 3, 9]))
    assert [(q.low, q.high, q.weight, q.fraction) for q in found] == [(63, 63, 5, 0.25), (64, 64, 2, 0.75)]
    assert quarters(np.full(2, np.nan), np.ones(2)) == []


def test_weight_quantiles_of_an_update():
    assert weight_quantiles(update(1, 1, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 6)) == [0.25, 1.25, 2.5, 3.75, 4.75]


def test_extremes_show_a_sample_once_and_none_on_both_sides():
    first = update(1, 1, [0.5, 3.0, 1.0, 0.2], [0.0] * 4, index=[7, 8, 9, 7])
    highest, lowest = extremes(weighted_samples([first]), 2)
    assert highest.tolist() == [1] and lowest.tolist() == [3]
    assert [rows.tolist() for rows in extremes(weighted_samples([first]), 0)] == [[], []]


def test_distinct_n_grams():
    assert distinct([1, 2, 1, 2], 1) == 0.5 and distinct([1, 2, 1, 2], 2) == pytest.approx(2 / 3)
    assert distinct([4, 5, 6], 2) == 1.0 and math.isnan(distinct([4], 2))


def test_tfidf_similarity_by_hand():
    samples, target = [[1, 1, 2], [3], []], [[1, 2]]
    found = tfidf_similarity(samples, target, 1)
    # Token 1 and token 2 are in 2 of 4 texts: the same idf, which falls out of the cosine of (2, 1) and (1, 1).
    assert found[0] == pytest.approx(3 / math.sqrt(5 * 2))
    assert found[1] == 0.0 and found[2] == 0.0
    # A rare token counts for more: idf of 1 in 2 of 3 texts, of 2 in 1 of 3.
    common, rare = math.log(4 / 3) + 1, math.log(4 / 2) + 1
    found = tfidf_similarity([[1], [3]], [[1, 2]], 1)
    assert found[0] == pytest.approx(common / math.hypot(common, rare))


def test_similarity_of_pairs_knows_the_order():
    found = tfidf_similarity([[1, 2, 3], [3, 2, 1]], [[1, 2, 3, 1, 2]], 2)
    assert found[0] > 0.5 and found[1] == 0.0
    assert np.isnan(tfidf_similarity([[1, 2]], [], 2)).all()


def test_a_cell_is_tinted_by_how_far_its_value_is_from_the_middle():
    assert "--more) 60%" in tint(2.0) and "--less) 30%" in tint(0.5) and tint(None) == ""
    assert "--more) 60%" in tint(50.0)


def run_of(updates: list[Record], **step: object) -> RunRecords:
    steps = [{"kind": "train", "iteration": i, "lm_loss": 3.0 - i / 10, **step} for i in range(1, 6)]
    return RunRecords(steps=steps, updates=updates, evaluations=[])


def test_text_of_others_is_escaped_and_the_page_names_its_facts(tmp_path: Path):
    hostile, other = "<b>&\"'$x^{", "_b \udc80"
    run = run_of(
        [update(4, 1, [0.5, 1.5], [1.0, 3.0], source=[hostile, other])],
        stage=1,
        share_by_source={hostile: 0.6, other: 0.4},
        weight_by_source={hostile: 1.2, other: 0.8},
        effective_sample_size=0.9,
    )
    samples = weighted_samples(run.updates)
    text = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>"
    example = Example(hostile, iteration=4, index=40, weight=0.5, alignment=-1.0, loss=2.0, text=text)
    examples = {1: ([example], [example])}
    report = make_report(f"run {text}", run, samples, samples, examples=examples, notes=[text])
    facts = {fact.title: fact.value for fact in key_facts(report)}
    assert (facts["counts most"], facts["counts least"]) == (hostile, other)
    assert facts["effective sample size"] == "90 %"
    assert facts["agrees with alignment"] == "+1.00"
    page = write_page(report, tmp_path).read_text()
    assert page.count("&lt;script&gt;") == 5 and "&lt;b&gt;&amp;&#34;&#39;$x^{" in page
    assert "<script" not in page and "<img src=x" not in page and hostile not in page
    assert "default-src &#39;none&#39;" not in page and "content=\"default-src 'none'; img-src data:;" in page
    assert {path.name for path in tmp_path.iterdir()} == {
        "preference.html",
        "losses.png",
        "weights.png",
        "sources.png",
        "correlations.png",
        "quarters.png",
    }


@pytest.mark.parametrize("step", [{}, {"stage": 0, "share_by_source": {"a": 1.0}}])
def test_a_run_without_weights_has_a_page_too(step: dict, tmp_path: Path):
    nothing = weighted_samples([])
    page = write_page(make_report("run", run_of([], **step), nothing, nothing), tmp_path).read_text()
    assert "No step of this run was weighted" in page and "no weights of single samples" in page


BENEFIT = {
    "arms": {"uniform": {"test_loss": [2.5, 2.7], "tokens": 1000, "seconds": [9, 11]}},
    "gap_closed": 0.25,
    "token_ratio": 0.8,
    "time_ratio": None,
}


def test_the_benefit_table_holds_means_and_deviations(tmp_path: Path):
    file = tmp_path / "benefit.json"
    file.write_text(json.dumps(BENEFIT))
    nothing = weighted_samples([])
    report = make_report("run", run_of([]), nothing, nothing, benefit=read_benefit(file))
    page = write_page(report, tmp_path).read_text()
    assert "2.6000 ± 0.1414" in page and "1,000" in page and ">10</td>" in page
    assert "closes 25&nbsp;% of the gap" in page and "0.80 times their tokens" in page and "In time" not in page


@pytest.mark.parametrize(
    "content", ["", "[]", '{"arms": {"x": {"test_loss": [], "seconds": [1], "tokens": 1}}}', '{"a": 1}']
)
def test_a_file_that_is_no_benefit_is_refused(content: str, tmp_path: Path):
    file = tmp_path / "benefit.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"--benefit .*benefit\.json"):
        read_benefit(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_benefit(tmp_path / "nothing.json")
