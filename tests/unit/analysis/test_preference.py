"""Statistics of recorded weights against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_dwm.analysis.preference import (
    correlations,
    described_samples,
    extremes,
    quartile_groups,
    rank_correlation,
    ranks,
    source_alignments,
    stage_sources,
    standardized,
    weight_quantiles,
    weighted_samples,
)
from tests.unit.analysis.made_records import update


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


def test_a_stage_is_described_by_many_updates_and_of_large_batches_by_a_part():
    updates = [update(i, 1 + (i > 5), [1.0, 1.0], [0.0, 1.0]) for i in range(1, 10)]
    assert sorted(set(described_samples(updates, 1).iteration.tolist())) == [1, 6]
    assert len(described_samples(updates, 1)) == 2
    whole = described_samples(updates, 1000)
    assert whole.iteration.tolist() == weighted_samples(updates).iteration.tolist()
    large = [update(i, 1, [1.0] * 100, list(range(100))) for i in range(1, 9)]
    part = described_samples(large, 160)
    assert len(part) == 160 and set(part.iteration.tolist()) == set(range(1, 9))
    # Alignments are standardized in the whole batch, and both sources, which come in turn, are drawn.
    assert part.alignment[0] == standardized(list(range(100)))[part.index[0] - 10]
    assert 40 < (part.source == "a").sum() < 120


def test_figures_by_source_count_every_sample_once():
    # 10 samples a step. Warm-up: 5 of a. Stage 1: 4 of a with weight 2, then 8 of a with weight 0.5.
    steps = [
        {"stage": 0, "share_by_source": {"a": 0.5, "b": 0.5}},
        {"stage": 1, "share_by_source": {"a": 0.8, "b": 0.2}, "weight_by_source": {"a": 2.0, "b": 1 / 3}},
        {"stage": 1, "share_by_source": {"a": 0.4, "b": 0.6}, "weight_by_source": {"a": 0.5, "b": 3.0}},
    ]
    samples = weighted_samples([update(2, 1, [1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 0.0, 2.0])])
    found = stage_sources(steps, samples)
    assert found[0]["a"].weight == 1.0 and found[0]["a"].alignment.value is None
    assert found[1]["a"].weight == pytest.approx((4 * 2.0 + 8 * 0.5) / 12)
    assert found[1]["b"].weight == pytest.approx((6 / 3 + 2 * 3.0) / 8)
    assert found[1]["a"].loss_fraction == pytest.approx(0.6) and found[1]["a"].sample_fraction == pytest.approx(0.6)
    assert found[1]["a"].alignment.value == -1.0 and found[1]["b"].alignment.value == 1.0
    assert found[1]["a"].alignment.low is None and found[1]["a"].alignment.n == 1


def test_samples_of_weight_0_count_as_samples():
    """An oracle's source never counts; of half a source, a step has samples with weight 2, and one without."""
    both = {"fraction_by_source": {"good": 0.75, "bad": 0.25, "none": 0.0}}
    steps = [
        {
            **both,
            "share_by_source": {"good": 1.0, "bad": 0.0, "none": 0.0},
            "weight_by_source": {"good": 4 / 3, "bad": 0},
        },
        {
            **both,
            "share_by_source": {"good": 0.5, "bad": 0.5, "none": 0.0},
            "weight_by_source": {"good": 2 / 3, "bad": 2},
        },
    ]
    none = weighted_samples([])
    oracle = stage_sources([{"stage": 1, **steps[0]}], none)[1]
    assert (oracle["bad"].weight, oracle["bad"].sample_fraction, oracle["bad"].loss_fraction) == (0.0, 0.25, 0.0)
    half = stage_sources([{"stage": 1, **step} for step in steps], none)[1]
    assert half["bad"].weight == 1.0 and half["good"].weight == 1.0 and half["good"].sample_fraction == 0.75
    assert half["none"].weight is None and half["none"].sample_fraction == 0.0


def test_sources_are_compared_in_the_updates_that_have_both():
    updates = [update(i, 1, [1.0] * 4, [0.0, 2.0, 1.0, 3.0 + i / 100]) for i in range(1, 7)]
    only_a = update(7, 1, [1.0, 1.0], [0.0, 5.0], source=["a", "a"])
    found = source_alignments(weighted_samples([*updates, only_a]), ["a", "b"])
    assert found.count.tolist() == [[2, 2]] * 6 + [[2, 0]] and np.isnan(found.mean[6, 1])
    gap = found.difference("b", "a")
    assert gap.n == 6 and gap.value == pytest.approx((found.mean[:6, 1] - found.mean[:6, 0]).mean())
    assert gap.low < gap.value < gap.high and gap.excludes_zero and found.of("a").n == 7


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


def test_correlations_are_taken_within_batches_and_within_sources():
    # In every batch the higher weight has the higher value; over batches, within a source, it is the other way round.
    updates = [update(i, 1, [2.0 - i / 10, 3.0 - i / 10], [0.0, 1.0]) for i in range(1, 13)]
    found = correlations(weighted_samples(updates), np.arange(24.0))
    in_batch, in_source = found[1].in_batch, found[1].in_source
    assert (in_batch.value, in_batch.low, in_batch.high) == pytest.approx((1.0, 1.0, 1.0))
    assert (in_batch.n, in_batch.unit) == (12, "updates")
    assert in_source.value == pytest.approx(-1.0) and (in_source.n, in_source.unit) == (24, "samples")


def test_few_updates_and_equal_values_are_told_apart():
    updates = [update(i, 1, [0.5, 1.5], [0.0, 1.0]) for i in range(1, 4)]
    samples = weighted_samples(updates)
    few = correlations(samples, np.arange(6.0))[1].in_batch
    assert few.value == pytest.approx(1.0) and few.n == 3 and not few.is_known
    assert correlations(samples, np.ones(6))[1].in_batch.value is None


def test_quarters_by_hand():
    values, weights = np.arange(8.0), np.array([1.0, 1, 2, 2, 3, 3, 4, 6])
    found = quartile_groups(values, weights)
    assert [(q.low, q.high) for q in found] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert [q.weight for q in found] == [1, 2, 3, 5] and {q.fraction for q in found} == {0.25}
    assert [q.error for q in found] == pytest.approx([0, 0, 0, 1 / math.sqrt(2)]) and {q.n for q in found} == {2}


def test_few_different_values_are_a_part_each():
    found = quartile_groups(np.array([64.0, 64, 63, 64, np.nan]), np.array([1.0, 2, 5, 3, 9]))
    assert [(q.low, q.high, q.weight, q.fraction) for q in found] == [(63, 63, 5, 0.25), (64, 64, 2, 0.75)]
    assert quartile_groups(np.full(2, np.nan), np.ones(2)) == []


def test_weight_quantiles_of_an_update():
    assert weight_quantiles(update(1, 1, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 6)) == [0.25, 1.25, 2.5, 3.75, 4.75]


def test_extremes_show_a_sample_once_and_none_on_both_sides():
    first = update(1, 1, [0.5, 3.0, 1.0, 0.2], [0.0] * 4, index=[7, 8, 9, 7])
    highest, lowest = extremes(weighted_samples([first]), 2)
    assert highest.tolist() == [1] and lowest.tolist() == [3]
    assert [rows.tolist() for rows in extremes(weighted_samples([first]), 0)] == [[], []]
