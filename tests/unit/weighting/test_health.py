"""Signs of a weighting that does not work."""

from __future__ import annotations

import pytest
import torch

from megatron_dwm.errors import UserError
from megatron_dwm.weighting.health import check_scores, check_weights, require_alignments


def test_collapsed_weights_are_noticed_below_the_floor_only():
    one_hot = torch.zeros(10)
    one_hot[3] = 10
    (warning,) = check_weights(one_hot, floor=0.2)
    assert "0.100 of the batch" in warning.message and "--dwm-min-effective-sample-size 0.2" in warning.message
    assert check_weights(one_hot, floor=0.05) == [] and check_weights(torch.ones(10), floor=0.99) == []


def test_equal_scores_are_a_sign_only_after_learning():
    equal = torch.full((5,), 0.3)
    assert check_scores(equal, updates=0) == []
    assert "after 4 outer updates" in check_scores(equal, updates=4)[0].message
    assert check_scores(torch.arange(5.0), updates=4) == []


def test_alignments_that_are_all_zero_end_the_run():
    require_alignments(torch.tensor([0.0, 1e-30]))
    with pytest.raises(UserError, match=r"exactly zero.*: check the target set \(--dwm-target-data-path"):
        require_alignments(torch.zeros(5))
