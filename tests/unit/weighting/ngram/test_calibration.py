"""The curve that calibrates the scores of a linear weighter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_dwm.weighting.ngram.calibration import PRIOR_SAMPLES, Calibration


def test_an_unfitted_curve_leaves_scores_unchanged():
    scores = torch.randn(7, 1, generator=torch.Generator().manual_seed(1))
    assert torch.equal(Calibration(12)(scores), scores)
    equal = Calibration(3)
    equal.fit(torch.full((9,), 0.5).double(), torch.randn(9).double())  # of a weighter that knows nothing yet
    assert torch.equal(equal(scores), scores)


def test_points_by_hand():
    curve = Calibration(2)
    curve.fit(torch.tensor([3.0, 0.0, 1.0, 2.0]).double(), torch.tensor([0.5, -2.0, 0.0, 1.5]).double())
    assert curve.scores.tolist() == [0.5, 2.5]
    assert curve.calibrated.tolist() == pytest.approx([0.5 - 2 / (2 + PRIOR_SAMPLES), 2.5 + 2 / (2 + PRIOR_SAMPLES)])


def test_it_is_numpys_interpolation_constant_beyond_its_ends():
    generator = torch.Generator().manual_seed(2)
    curve = Calibration(12)
    curve.fit(*torch.randn(2, 500, generator=generator, dtype=torch.float64).unbind())
    scores = torch.cat([3 * torch.randn(100, generator=generator), curve.scores]).unsqueeze(1)
    expected = np.interp(scores.numpy(), curve.scores.numpy(), curve.calibrated.numpy())
    assert torch.allclose(curve(scores), torch.from_numpy(expected).float(), rtol=0, atol=1e-6)


def test_with_many_samples_of_two_kinds_it_finds_their_two_levels():
    generator = torch.Generator().manual_seed(3)
    kinds = torch.arange(20000) % 2
    scores = kinds + 0.2 * torch.randn(20000, generator=generator, dtype=torch.float64)
    wanted = 4.0 * kinds + torch.randn(20000, generator=generator, dtype=torch.float64)
    curve = Calibration(12)
    curve.fit(scores, wanted - scores)
    found = curve(torch.tensor([-0.5, -0.1, 0.1, 0.9, 1.1, 1.5]))
    # The noise of a point is 1/sqrt(1667) = 0.025; the prior pulls it by 3 * 150 / 1817 = 0.25 at most.
    assert torch.allclose(found, torch.tensor([0.0, 0.0, 0.0, 4.0, 4.0, 4.0]), rtol=0, atol=0.35)


def test_its_gradient_is_the_slope():
    curve = Calibration(2)
    curve.fit(torch.tensor([0.0, 1.0]).double(), torch.tensor([0.0, 2.0 * (1 + PRIOR_SAMPLES)]).double())
    scores = torch.tensor([[-1.0], [0.25], [2.0]], requires_grad=True)
    curve(scores).sum().backward()
    assert scores.grad is not None and scores.grad.squeeze().tolist() == [0.0, 3.0, 0.0]
