"""Offsets of scores by source (``--dwm-source-offsets``): what a sample's source says beyond its tokens.

A weighter reads tokens alone, and a regression on few samples gives scores that differ too little. If the sources of
the samples are known, the mean error of a source's scores can be estimated much earlier, from all of its samples. It is
added to them. Sources then differ as much as with weights per source
(:class:`~megatron_dwm.weighting.targeted.SourceAlignmentWeighting`), and samples of one source as the weighter says.

Shape legend: N samples of the global batch, S sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.errors import UserError
from megatron_dwm.weighting.source_means import SourceMeans
from megatron_dwm.weighting.weights import best_scores

DECAY = 0.95
"""Factor by which what an earlier update has found counts less: the weighter learns, and its errors change."""
PRIOR_SAMPLES = 150
"""Offsets are shrunk towards 0, as if this many more samples of each source had no error, as in the calibration."""


class SourceOffsets:
    """One number for each source, added to the scores of its samples; 0 before the first update."""

    def __init__(self, config: WeightingConfig, sources: Sequence[str]) -> None:
        """
        Raises:
            UserError: there is only one source, whose offset would change no weight.
        """
        if len(sources) < 2:
            raise UserError(
                f"--dwm-source-offsets: the training data has one source, {sources[0]}, whose offset would change no "
                "weight; leave it out, or give --data-path several datasets"
            )
        self.config, self._errors = config, SourceMeans(sources)

    @property
    def values(self) -> torch.Tensor:
        """The offset of each source [S], float64."""
        return self._errors.means(PRIOR_SAMPLES)

    def of(self, source: torch.Tensor) -> torch.Tensor:
        """Return the offsets of samples [N], float64, from the numbers of their sources [N], on the same device."""
        return self.values.to(source.device, non_blocking=True)[source]

    def by_source(self) -> dict[str, float]:
        """Return the offset of each source, by name."""
        return dict(zip(self._errors.sources, self.values.tolist(), strict=True))

    def learn(self, source: torch.Tensor, scores: torch.Tensor, alignments: torch.Tensor) -> None:
        """Learn from the errors of one batch's scores; the same on every rank.

        Args:
            source: the number of each sample's source [N], on the CPU.
            scores: the scores that the batch had in its step, with the offsets [N], float64, on the CPU.
            alignments: the samples' alignments [N], float64, on the CPU.
        """
        config = self.config
        if config.dwm_lr == 0:  # weighting that does not learn leaves the run as it is
            return
        settings = config.dwm_temperature, config.dwm_kl_weight, config.dwm_clip_alignment
        from_tokens = scores - self.values[source]
        errors = best_scores(alignments, *settings) - (from_tokens - from_tokens.mean())
        self._errors.add(source, errors, DECAY)

    def state_dict(self) -> dict[str, list[float]]:
        """Return the sums of errors and of samples, by source."""
        return self._errors.state_dict()

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Continue from :meth:`state_dict`; sources that it does not name start at 0."""
        self._errors.load_state_dict(state)
