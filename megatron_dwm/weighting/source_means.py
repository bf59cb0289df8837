"""Means of a value by source of the training data, over the batches of a run.

Shape legend: N samples of a batch, S sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


class SourceMeans:
    """The sum of a value over the samples of each source, and the number of samples; everything on the CPU."""

    def __init__(self, sources: Sequence[str]) -> None:
        """
        Args:
            sources: names of the sources, by ``Batch.source``.
        """
        self.sources = list(sources)
        self._sums = torch.zeros(2, len(sources), dtype=torch.float64)  # of values; of samples

    def add(self, source: torch.Tensor, values: torch.Tensor, decay: float = 1.0) -> None:
        """Add the values of one batch.

        Args:
            source: the number of each sample's source [N].
            values: the samples' values [N], float64.
            decay: factor by which earlier batches, their values and numbers of samples, count less from now on.
        """
        self._sums *= decay
        self._sums.index_add_(1, source, torch.stack([values, torch.ones_like(values)]))

    def means(self, prior_samples: float = 0.0) -> torch.Tensor:
        """Return the mean of each source [S], float64; 0 for a source without samples.

        Args:
            prior_samples: shrink the means towards 0, as if each source had so many more samples of value 0.
        """
        total, count = self._sums.unbind()
        return total / (count + prior_samples).clamp(min=1)

    def state_dict(self) -> dict[str, list[float]]:
        """Return the sums of each source by name, because a resumed run may order the sources differently."""
        return dict(zip(self.sources, self._sums.T.tolist(), strict=True))

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Continue from :meth:`state_dict`; sources that it does not name start at 0."""
        sums = [state.get(name, [0.0, 0.0]) for name in self.sources]
        self._sums = torch.tensor(sums, dtype=torch.float64).T.contiguous()
