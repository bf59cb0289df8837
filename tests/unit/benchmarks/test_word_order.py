"""The figures of the word-order experiment, from records."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_dwm.benchmarks.word_order import area_under_curve, quarters, table


def update(weights: list[float], alignments: list[float]) -> dict[str, Any]:
    samples = {"weight": weights, "alignment": alignments, "source": ["prose", "prose", "shuffled", "shuffled"]}
    return {"samples": samples, "effective_sample_size": 0.5}


def test_the_area_under_the_curve_counts_ties_half():
    is_positive = torch.tensor([True, True, False, False])
    for values, expected in (([4, 3, 2, 1], 1.0), ([1, 1, 1, 1], 0.5), ([1, 2, 3, 4], 0.0), ([2, 4, 2, 1], 0.875)):
        assert area_under_curve(torch.tensor(values), is_positive) == expected
    assert area_under_curve(torch.ones(2), torch.tensor([True, True])) == 0.5


def test_quarters_are_means_over_a_quarter_of_the_updates():
    right, wrong = update([2.0, 2.0, 0.0, 0.0], [1, 1, -1, -1]), update([0.0, 0.0, 2.0, 2.0], [1, 1, -1, -1])
    found = quarters([right, wrong, wrong, wrong, right, right, right, right], ["prose"])
    assert [(q.first_update, q.last_update) for q in found] == [(1, 2), (3, 4), (5, 6), (7, 8)]
    assert [q.auc for q in found] == [0.5, 0.0, 1.0, 1.0]
    assert [q.alignment_auc for q in found] == [1.0] * 4
    assert [q.gain for q in found] == pytest.approx([0.0, -1.0, 1.0, 1.0])
    assert "7-8        1.000 (1.000)" in table([found], [3.5])
