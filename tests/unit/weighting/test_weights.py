"""Scores to weights, and the closed-form gradients against autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_dwm.weighting.weights import (
    WeightStatistics,
    best_scores,
    objective,
    objective_score_gradient,
    standardized,
    target_score_gradient,
    weights_from_scores,
)

N = 7


def random(seed: int) -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e30, 1e-30])
@pytest.mark.parametrize("count", [1, 3, 7, 10, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_equal_scores_weigh_exactly_one(value: float, count: int, temperature: float):
    weights = weights_from_scores(torch.full((count,), value), temperature)
    assert torch.equal(weights, torch.ones(count, dtype=torch.float64))


def test_weights_are_n_times_the_softmax():
    scores = random(0)
    expected = N * torch.softmax(scores / 0.7, 0)
    torch.testing.assert_close(weights_from_scores(scores, 0.7), expected, rtol=1e-14, atol=0)
    assert torch.isfinite(weights_from_scores(1e4 * scores, 1.0)).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_outlying_alignments_are_cut_off(sign: int):
    alignments = torch.cat([random(1), torch.tensor([sign * 50.0])])
    plain, clipped = standardized(alignments), standardized(alignments, 2.0)
    assert sign * plain[-1] > 2.5 and sign * clipped[-1] == 2.0
    assert torch.equal(clipped[:-1], plain[:-1])


def test_standardized_alignments_have_mean_0_and_variance_1():
    found = standardized(100 + 5 * random(1))
    assert abs(float(found.mean())) < 1e-14 and float(found.square().mean()) == pytest.approx(1, abs=1e-14)
    for value in (3.0, 0.1, 1e-30, -3.7):
        assert torch.equal(standardized(torch.full((N,), value)), torch.zeros(N, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("kl_weight", [0.5, 2.0])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_the_best_scores_leave_no_gradient(temperature: float, kl_weight: float, clip: float):
    alignments = random(2)
    scores = best_scores(alignments, temperature, kl_weight, clip)
    gradient = objective_score_gradient(standardized(alignments, clip), scores, temperature, kl_weight)
    assert gradient.abs().max() < 1e-14 and abs(float(scores.mean())) < 1e-14
    assert objective(alignments, scores, temperature, kl_weight, clip) < 0


@pytest.mark.parametrize("temperature", [1.0, 0.4, 3.0])
@pytest.mark.parametrize("kl_weight", [0.0, 2.0])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_the_objectives_gradient_is_autograds(temperature: float, kl_weight: float, clip: float):
    scores, alignments = random(2).requires_grad_(), 3 + 10 * random(3)
    w = torch.softmax(scores / temperature, 0)
    value = -(standardized(alignments, clip) * w).sum() + kl_weight * (w * (N * w).log()).sum()
    (expected,) = torch.autograd.grad(value, scores)
    found = objective_score_gradient(standardized(alignments, clip), scores.detach(), temperature, kl_weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert objective(alignments, scores.detach(), temperature, kl_weight, clip) == pytest.approx(
        value.item(), abs=1e-13
    )


def test_scores_too_far_apart_for_a_number_leave_the_objective_finite():
    scores, alignments = torch.tensor([0.0, -2000.0, 1.0, -800.0]), random(8)[:4]
    assert float(weights_from_scores(scores, 1.0)[1]) == 0
    gradient = objective_score_gradient(standardized(alignments), scores, 1.0, 2.0)
    assert gradient.isfinite().all() and abs(float(gradient.sum())) < 1e-15
    # The weights are those of the two scores that count, among four.
    w, a = torch.softmax(torch.tensor([0.0, 1.0], dtype=torch.float64), 0), standardized(alignments)[[0, 2]]
    expected = -(w * a).sum() + 2.0 * (w * (4 * w).log()).sum()
    assert objective(alignments, scores, 1.0, 2.0) == pytest.approx(float(expected), abs=1e-13)


def test_the_target_losss_gradient_is_autograds_through_the_step():
    """On a linear target loss the first order is all there is: l_val(θ') = ⟨v, θ − η Σ w_i g_i⟩."""
    generator = torch.Generator().manual_seed(4)
    v = torch.randn(5, generator=generator, dtype=torch.float64)
    gradients = torch.randn(N, 5, generator=generator, dtype=torch.float64)
    scores, temperature, rate = random(5).requires_grad_(), 0.6, 0.02
    value = v @ (-rate * torch.softmax(scores / temperature, 0) @ gradients)
    (expected,) = torch.autograd.grad(value, scores)
    found = target_score_gradient(gradients @ v, scores.detach(), temperature, rate)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_statistics_of_uniform_and_of_one_hot_weights():
    uniform = WeightStatistics.of(torch.ones(N))
    assert uniform.effective_sample_size == pytest.approx(1) and uniform.kl == 0
    assert uniform.entropy == pytest.approx(math.log(N))
    one_hot = torch.zeros(N)
    one_hot[2] = N
    single = WeightStatistics.of(one_hot)
    assert single.effective_sample_size == pytest.approx(1 / N)
    assert single.entropy == 0 and single.kl == pytest.approx(math.log(N))


def test_without_a_kl_term_the_optimum_is_one_hot_and_with_it_exponential():
    alignments = random(6)

    def optimum(kl_weight: float, rate: float) -> torch.Tensor:
        scores = torch.zeros(N, dtype=torch.float64)
        for _ in range(1000):
            scores -= rate * objective_score_gradient(standardized(alignments), scores, 1.0, kl_weight)
        return torch.softmax(scores, 0)

    assert float(optimum(0.0, 20.0).max()) > 0.99
    torch.testing.assert_close(optimum(2.0, 2.0), torch.softmax(standardized(alignments) / 2.0, 0), rtol=1e-9, atol=0)
