"""A cache of the scores of a frozen weighter: each sample is scored once, on one rank.

Shape legend: N samples of the global batch, c of this rank's slice, s sequence length, k samples that are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_dwm.weighting.sample_gather import SampleGather
from megatron_dwm.weighting.sample_reader import sample_key


class ScoreCache:
    """The newest scores, keyed by the samples' tokens; the same on every rank."""

    def __init__(self, max_samples: int) -> None:
        """
        Args:
            max_samples: the number of samples that are kept.
        """
        self.max_samples = max_samples
        self._scores: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._scores)

    def score(
        self,
        tokens: torch.Tensor,
        replica_samples: int,
        score: Callable[[torch.Tensor], torch.Tensor],
        sample_gather: SampleGather,
    ) -> torch.Tensor:
        """Return the scores of the global batch [N] on the CPU; a collective call of all ranks.

        Args:
            tokens: this rank's slice of the batch [c, s].
            replica_samples: samples of the replica.
            score: computes the scores of samples [., s].
            sample_gather: the gathering of the run's batches.
        """
        keys = [int.from_bytes(sample_key(sample), "little", signed=True) for sample in tokens.cpu().numpy()]
        missing = {key: place for place, key in enumerate(keys) if key not in self._scores}
        positions = torch.tensor(list(missing.values()), dtype=torch.int64, device=tokens.device)
        found = dict(zip(missing, score(tokens[positions]).tolist(), strict=True))
        rank_scores = torch.tensor(
            [found[key] if key in found else self._scores[key] for key in keys], dtype=torch.float32
        ).to(tokens.device)
        rank_keys = torch.tensor(keys, dtype=torch.int64, device=tokens.device)
        scores = sample_gather.gather_from_ranks(rank_scores, replica_samples).cpu()
        all_keys = sample_gather.gather_from_ranks(rank_keys, replica_samples).cpu()
        for key, value in zip(all_keys.tolist(), scores.tolist(), strict=True):
            self._scores.setdefault(key, value)
        while len(self._scores) > self.max_samples:
            del self._scores[next(iter(self._scores))]
        return scores

    def clear(self) -> None:
        """Remove all scores."""
        self._scores.clear()

    def state(self) -> dict[str, Any]:
        """Return the state of the cache: keys and scores [k], oldest first."""
        keys = torch.tensor(list(self._scores), dtype=torch.int64)
        return {"keys": keys, "scores": torch.tensor(list(self._scores.values()), dtype=torch.float32)}

    def load(self, state: dict[str, Any]) -> None:
        """Load :meth:`state`."""
        self._scores = dict(zip(state["keys"].tolist(), state["scores"].tolist(), strict=True))
