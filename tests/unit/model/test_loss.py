"""The reduction of token losses, weighted and not."""

from __future__ import annotations

import pytest
import torch

from megatron_dwm.errors import UserError
from megatron_dwm.model.loss import SampleLosses, as_token_losses, plain_loss, weighted_loss


def test_weights_multiply_the_losses_of_their_samples():
    losses = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    weights = torch.tensor([9.0, 0.5, 2.0, 3.0], dtype=torch.float64)
    # Of a batch of four samples this microbatch is the last three.
    loss = weighted_loss(weights)(losses, mask, slice(1, 4))
    assert loss.dtype == losses.dtype
    assert float(loss) == 0.5 * 3 + 2.0 * 3 + 3.0 * 6
    assert float(plain_loss(losses, mask, slice(1, 4))) == float(weighted_loss(None)(losses, mask, slice(1, 4))) == 12


def test_the_gradient_of_a_token_is_its_weight_where_it_counts():
    losses = torch.ones(2, 2, requires_grad=True)
    weighted_loss(torch.tensor([0.25, 4.0]))(losses, torch.tensor([[1.0, 0.0], [1.0, 1.0]]), slice(0, 2)).backward()
    assert torch.equal(losses.grad, torch.tensor([[0.25, 0.0], [4.0, 4.0]]))


def test_sample_losses_are_not_weighted_and_count_unmasked_tokens():
    mask = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    losses = SampleLosses.of(torch.tensor([[1.0, 3.0], [5.0, 7.0], [9.0, 6.0]]), mask)
    assert losses.mean.tolist() == [2.0, 0.0, 6.0]
    assert losses.sums.tolist() == [10.0, 3.0]


@pytest.mark.parametrize(
    "output", [torch.tensor(2.0), torch.ones(3), torch.ones(6), torch.ones(2, 3), torch.ones(3, 1)]
)
def test_a_loss_that_is_not_of_tokens_is_refused(output: torch.Tensor):
    """A scalar, a loss of each sample, flattened tokens, [s, b], and what would broadcast."""
    mask = torch.ones(3, 2)
    with pytest.raises(UserError, match=r"where token losses \[3, 2\] are needed.*--cross-entropy-loss-fusion"):
        as_token_losses(output, mask)


def test_token_losses_are_at_least_float32():
    mask = torch.ones(3, 2)
    assert as_token_losses(torch.ones(3, 2, dtype=torch.bfloat16), mask).dtype == torch.float32
    assert as_token_losses(torch.ones(3, 2, dtype=torch.float64), mask).dtype == torch.float64
