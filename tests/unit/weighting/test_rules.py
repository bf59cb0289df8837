"""The formulas of rules, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_dwm.weighting.rules import half_of_samples, high_loss_scores, linupper_scores
from megatron_dwm.weighting.targeted import similarities, top_scores
from megatron_dwm.weighting.weights import weights_from_scores


def test_linupper_rises_to_the_middle_of_the_losses_and_is_flat_above():
    losses = torch.tensor([2.0, 2.5, 3.0, 3.5, 4.0])  # h = -1, -0.5, 0, 0.5, 1
    scores = linupper_scores(losses)
    assert scores.tolist() == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0])
    # At r = 0.5 the weights are proportional to 1, e, e², e², e².
    sizes = [1.0, math.e, math.e**2, math.e**2, math.e**2]
    expected = [5 * size / sum(sizes) for size in sizes]
    assert weights_from_scores(scores, 0.5).tolist() == pytest.approx(expected)
    assert not linupper_scores(torch.full((3,), 2.2)).any()


def test_high_losses_have_scores_of_the_given_spread():
    scores = high_loss_scores(torch.tensor([1.0, 2.0, 3.0, 6.0]), 0.5)
    assert scores.std(correction=0).item() == pytest.approx(0.5) and scores.argmax() == 3


def test_similarity_is_the_cosine_with_the_target():
    hidden = torch.tensor([[3.0, 4.0], [-8.0, 6.0], [1.0, 0.0]])
    assert similarities(hidden, torch.tensor([3.0, 4.0])).tolist() == pytest.approx([1.0, 0.0, 0.6], abs=1e-6)


@pytest.mark.parametrize(("fraction", "expected"), [(0.5, [1, 3]), (0.25, [3]), (0.01, [3]), (1.0, [0, 1, 2, 3])])
def test_the_best_aligned_samples_count_alike_and_the_others_not(fraction: float, expected: list[int]):
    weights = weights_from_scores(top_scores(torch.tensor([-1.0, 2.0, 0.5, 7.0]), fraction), 1.0)
    assert weights.nonzero().flatten().tolist() == expected
    assert weights[expected].tolist() == pytest.approx([4 / len(expected)] * len(expected))


def test_halves_are_halves_that_have_nothing_in_common():
    index = np.arange(10_000)
    halves = np.array([half_of_samples(index, seed) for seed in range(1, 9)])
    # Of 10,000 fair draws 5,000 ± 50: four standard deviations.
    assert all(abs(int(half.sum()) - 5000) < 200 for half in halves)
    shared = np.array([(one == other).sum() for n, one in enumerate(halves) for other in halves[:n]])
    assert np.all(np.abs(shared - 5000) < 200)
    assert np.array_equal(half_of_samples(index[::-1], 3), halves[2][::-1])
