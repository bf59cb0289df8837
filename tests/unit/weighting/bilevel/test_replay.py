"""The replay keeps what its flags say, and draws from all of it."""

from __future__ import annotations

import pytest
import torch

from megatron_dwm.weighting.bilevel.learning import draw_generator
from megatron_dwm.weighting.bilevel.replay import Replay

SAMPLES, LENGTH = 8, 4


def replay(batches: int, max_batches: int = 64, half_life: float | None = None) -> Replay:
    """A replay in which a sample's tokens all are the number of its batch."""
    kept = Replay(max_batches, half_life)
    for number in range(batches):
        alignments = torch.arange(SAMPLES, dtype=torch.float64) + number
        kept.append(torch.full((SAMPLES, LENGTH), number), torch.arange(SAMPLES), alignments)
    return kept


def batches_drawn(kept: Replay, draws: int) -> torch.Tensor:
    """How often a sample of each batch was drawn."""
    numbers = [kept.draw(SAMPLES, draw_generator(1, step)).tokens[:, 0] for step in range(draws)]
    return torch.cat(numbers).bincount().double()


def test_it_keeps_the_newest_batches_and_counts_all():
    kept = replay(7, max_batches=3)
    assert [int(aligned.tokens[0, 0]) for aligned in kept.batches] == [4, 5, 6]
    assert (len(kept), kept.num_appended, int(kept.newest.tokens[0, 0])) == (3, 7, 6)


def test_samples_are_drawn_from_all_batches_alike_and_once_each():
    kept = replay(6)
    counts = batches_drawn(kept, 200)
    assert (counts / counts.sum() - 1 / 6).abs().max() < 0.03
    draw = kept.draw(10 * SAMPLES, draw_generator(1, 1))  # more than there are
    assert draw.tokens[:, 0].bincount().tolist() == [SAMPLES] * 6
    assert torch.equal(draw.positions, torch.arange(6 * SAMPLES))


def test_older_batches_are_drawn_less_by_the_half_life():
    kept = replay(12, half_life=2.0)
    assert kept.batch_weights()[[-1, -3, -5]].tolist() == [1.0, 0.5, 0.25]
    counts = batches_drawn(kept, 1000)
    # A draw of 8 among 96, without repetition, is nearly one with repetition.
    assert float(counts[-3] / counts[-1]) == pytest.approx(0.5, abs=0.1)


def test_a_draw_keeps_tokens_and_alignments_together_wherever_the_tokens_are():
    kept, half = replay(5), Replay(64, None)
    for aligned in kept.batches:
        half.append(aligned.tokens[1::2], aligned.positions[1::2], aligned.alignments)
    whole, part = (r.draw(SAMPLES, draw_generator(3, 1)) for r in (kept, half))
    assert torch.equal(whole.alignments, part.alignments)
    assert torch.equal(whole.tokens[part.positions], part.tokens)
    again = kept.draw(SAMPLES, draw_generator(3, 1))
    other = kept.draw(SAMPLES, draw_generator(3, 2))
    assert torch.equal(whole.tokens, again.tokens) and not torch.equal(whole.alignments, other.alignments)
    assert float(whole.alignments.abs().max()) < 2  # standardized within their batches


def test_samples_of_another_length_start_it_anew():
    kept = replay(3)
    kept.append(torch.zeros(SAMPLES, LENGTH + 1), torch.arange(SAMPLES), torch.ones(SAMPLES, dtype=torch.float64))
    assert len(kept) == 1
