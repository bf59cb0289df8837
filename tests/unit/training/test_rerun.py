"""A run that diverges ends with one line that names the iteration."""

from __future__ import annotations

import pytest
import torch

from megatron_dwm.errors import UserError
from megatron_dwm.training.rerun import reported_divergence


def test_what_is_not_finite_is_one_line_and_other_errors_are_left_as_they_are():
    with pytest.raises(UserError, match=r"^iteration 3: an alignment is not finite$"), reported_divergence(3):
        raise FloatingPointError("an alignment is not finite")
    with pytest.raises(UserError, match=r"^iteration 3: .* lower --lr or --dwm-lr$"), reported_divergence(3):
        parameter = torch.nn.Parameter(torch.ones(2))
        parameter.grad = torch.ones(2)
        torch.optim.AdamW([parameter], lr=1e38).step()
    with pytest.raises(RuntimeError, match=r"^a kernel failed$"), reported_divergence(3):
        raise RuntimeError("a kernel failed")
