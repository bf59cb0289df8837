"""Weights from scores, and the closed-form gradient of the weighter's objective with respect to the scores.

Notation of docs/method.md: scores s [N], w = softmax(s / temperature) [N], sample weights u = N w [N], whose mean is 1,
alignments a [N]. Everything here is float64: N numbers, the same on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def weights_from_scores(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return u = N softmax(s / temperature) [N], float64; exactly 1.0 everywhere when all scores are equal."""
    return log_weights_from_scores(scores, temperature).exp()


def log_weights_from_scores(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return log u = s/t - logmeanexp(s/t) [N]: finite even where u underflows.

    The largest score is subtracted first, so that equal scores give exactly 0.
    """
    scaled = scores.double() / temperature
    shifted = scaled - scaled.max()
    return shifted - shifted.exp().mean().log()


def standardized(alignments: torch.Tensor, clip: float = 0.0) -> torch.Tensor:
    """Return alignments with mean 0 and variance 1 over the batch [N]; all zero if they do not differ.

    Args:
        clip: clip at this many standard deviations; 0 for no clipping.
    """
    a = alignments.double()
    if a.max() == a.min():  # their mean may differ by a rounding
        return torch.zeros_like(a)
    centered = a - a.mean()
    result = centered / centered.square().mean().sqrt()
    return result.clamp(-clip, clip) if clip > 0 else result


def best_scores(alignments: torch.Tensor, temperature: float, kl_weight: float, clip: float = 0.0) -> torch.Tensor:
    """Return the scores that minimize :func:`objective` if each can be chosen freely: τ â / λ [N], with the mean 0."""
    wanted = temperature / kl_weight * standardized(alignments, clip)
    return wanted - wanted.mean()


def target_score_gradient(
    alignments: torch.Tensor, scores: torch.Tensor, temperature: float, learning_rate: float
) -> torch.Tensor:
    """Return ∂ l_target(θ') / ∂ s_i = -η/τ · w_i (a_i - Σ_j w_j a_j) [N], for θ' = θ - η ∇Σ w_i l_i."""
    w = weights_from_scores(scores, temperature) / len(scores)
    a = alignments.double()
    return -learning_rate / temperature * w * (a - (w * a).sum())


def objective(
    alignments: torch.Tensor, scores: torch.Tensor, temperature: float, kl_weight: float, clip: float = 0.0
) -> float:
    """Return what the weighter minimizes: -Σ â_i w_i + λ Σ w_i log(N w_i); â are standardized, clipped alignments."""
    log_weights = log_weights_from_scores(scores, temperature)
    w = log_weights.exp() / len(log_weights)
    return float(-(standardized(alignments, clip) * w).sum() + kl_weight * (w * log_weights).sum())


def objective_score_gradient(
    standardized_alignments: torch.Tensor, scores: torch.Tensor, temperature: float, kl_weight: float
) -> torch.Tensor:
    """Return the gradient of :func:`objective` with respect to the scores [N]: w_i (c_i - Σ_j w_j c_j) / τ.

    c_i = -â_i + λ log(N w_i). The alignments [N] are already standardized and clipped; the host reads nothing.
    """
    log_weights = log_weights_from_scores(scores, temperature)
    w = log_weights.exp() / len(log_weights)
    c = -standardized_alignments + kl_weight * log_weights
    return w * (c - (w * c).sum()) / temperature


@dataclass(frozen=True)
class WeightStatistics:
    """How far a batch's weights are from uniform."""

    effective_sample_size: float
    """(Σ w)² / Σ w², as a fraction of the batch: 1 for uniform weights, 1/N for a single sample."""
    entropy: float
    """-Σ w log w in nats: log N for uniform weights."""
    kl: float
    """KL(w || uniform) in nats: 0 for uniform weights."""

    @staticmethod
    def of(sample_weights: torch.Tensor) -> WeightStatistics:
        """Return the statistics of weights [N], whose mean is 1."""
        w = sample_weights.double() / len(sample_weights)
        kl = float(torch.special.xlogy(w, sample_weights.double()).sum())
        return WeightStatistics(
            effective_sample_size=float(1.0 / (len(w) * w.square().sum())),
            entropy=float(-torch.special.xlogy(w, w).sum()),
            kl=kl,
        )
