"""The replay: samples that were aligned in past outer updates, on which the weighter continues to train.

Every rank keeps the tokens of the samples that it scored, and the alignments of whole batches.

Shape legend: N samples of an aligned batch, c of them on this rank, M samples drawn, s sequence length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dwm.runtime.collectives import all_reduce_over_world
from megatron_dwm.weighting.weights import standardized


@dataclass(eq=False)
class AlignedBatch:
    """Samples with their alignments."""

    tokens: torch.Tensor
    """This rank's samples [c, s], int32."""
    positions: torch.Tensor
    """Their positions in the batch [c], int64, on the CPU. Every position is on one rank."""
    alignments: torch.Tensor
    """Alignments of the whole batch in global order [N], float64, on the CPU."""
    unseen_scores: torch.Tensor | None = None
    """Linear scores [N] from before the weighter learned from the batch, float64, on the CPU; None if unknown."""


@dataclass(frozen=True)
class Draw:
    """Samples drawn from the replay, the same on every rank."""

    tokens: torch.Tensor
    """Tokens of the drawn samples that this rank holds [c, s], int64."""
    positions: torch.Tensor
    """Their positions among the drawn samples [c], int64, on the CPU."""
    alignments: torch.Tensor
    """Alignments of all drawn samples [M], float64, each standardized within its own batch."""


class Replay:
    """The newest aligned batches, oldest first."""

    def __init__(self, max_batches: int, half_life: float | None) -> None:
        """
        Args:
            max_batches: how many are kept.
            half_life: batches after which a sample counts half as much; None if all count the same.
        """
        self.batches: deque[AlignedBatch] = deque(maxlen=max_batches)
        self.half_life = half_life
        self.num_appended = 0
        """The number of batches of the whole run, including those that are no longer kept."""

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def newest(self) -> AlignedBatch:
        """The batch that was aligned last."""
        return self.batches[-1]

    def append(self, tokens: torch.Tensor, positions: torch.Tensor, alignments: torch.Tensor) -> None:
        """Add a batch: this rank's tokens [c, s] and their positions [c], and all alignments [N].

        If its samples have another length than the kept ones, it replaces all of them.
        """
        if self.batches and self.newest.tokens.shape[1] != tokens.shape[1]:
            self.batches.clear()
        self.batches.append(AlignedBatch(tokens.to(torch.int32), positions.cpu(), alignments.cpu()))
        self.num_appended += 1

    def batch_weights(self) -> torch.Tensor:
        """Return how much a sample of each batch counts, float64; 1 for the newest."""
        ages = torch.arange(len(self) - 1, -1, -1, dtype=torch.float64)
        return torch.ones_like(ages) if self.half_life is None else 0.5 ** (ages / self.half_life)

    def draw(self, count: int, generator: torch.Generator) -> Draw:
        """Draw samples without repetition, newer ones more often if there is a half-life.

        Args:
            count: how many; all if the replay holds fewer.
            generator: must be in the same state on every rank.
        """
        sizes = torch.tensor([len(aligned.alignments) for aligned in self.batches])
        chances = self.batch_weights().repeat_interleave(sizes)
        # Gumbel top-k (arXiv 1903.06059): the largest of Gumbel variables, shifted by log-probabilities, are a draw
        # without replacement.
        noise = -torch.rand(len(chances), dtype=torch.float64, generator=generator).clamp_min(1e-300).log()
        drawn = (chances.log() - noise.clamp_min(1e-300).log()).topk(min(count, len(chances))).indices.sort().values
        alignments = torch.cat([standardized(aligned.alignments) for aligned in self.batches])[drawn]
        place_in_draw = torch.full((len(chances),), -1)
        place_in_draw[drawn] = torch.arange(len(drawn))
        tokens, positions = [], []
        for aligned, of_batch in zip(self.batches, place_in_draw.split(sizes.tolist()), strict=True):
            held = of_batch[aligned.positions]
            drawn_here = (held >= 0).nonzero().squeeze(1)
            tokens.append(aligned.tokens[drawn_here.to(aligned.tokens.device, non_blocking=True)])
            positions.append(held[drawn_here])
        return Draw(torch.cat(tokens).long(), torch.cat(positions), alignments)

    def state(self) -> list[dict[str, Any]]:
        """Return all batches with whole tokens [N, s], int32, on the CPU; a collective call of all ranks."""
        entries = []
        for aligned in self.batches:
            whole = aligned.tokens.new_zeros(len(aligned.alignments), aligned.tokens.shape[1])
            whole[aligned.positions.to(whole.device)] = aligned.tokens
            all_reduce_over_world(whole)  # every sample is on one rank, and 0 on the others
            entry = {"tokens": whole.cpu(), "alignments": aligned.alignments}
            scores = aligned.unseen_scores
            entries.append(entry if scores is None else {**entry, "unseen_scores": scores})
        return entries

    def load(
        self, entries: list[dict[str, Any]], rank_positions: Callable[[int], torch.Tensor], device: torch.device
    ) -> None:
        """Load the batches of :meth:`state`, each rank its part, from any layout and batch size.

        Args:
            entries: the batches.
            rank_positions: returns, for a batch size, the positions of the samples that this rank keeps [c].
            device: where the tokens are kept.
        """
        for entry in entries:
            positions = rank_positions(len(entry["alignments"]))
            self.append(entry["tokens"][positions].to(device), positions, entry["alignments"])
            self.newest.unseen_scores = entry.get("unseen_scores")


def sum_over_ranks(values: torch.Tensor, positions: torch.Tensor, count: int) -> torch.Tensor:
    """Return all ``count`` values, from each rank's values [c] and their positions; a collective call."""
    whole = values.new_zeros(count)
    whole[positions] = values
    all_reduce_over_world(whole)
    return whole
