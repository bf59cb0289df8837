"""Documents with their weight over time: some samples, scored by each of a run's exported weighters.

A run seldom reads a sample twice, so its records hold one weight of each. Here every export scores the same samples. A
weight is relative to a batch. To be comparable over time, all are computed relative to the same reference samples.

Shape legend: d documents, r reference samples, s tokens of a sample, e exports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.errors import UserError, shortened
from megatron_dwm.weighting.export_manifest import MANIFEST, read_manifest
from megatron_dwm.weighting.weighter import Weighter
from megatron_dwm.weighting.weighter_folder import SampleTokens, read_weighter_folder

REFERENCE_SAMPLES = 64
"""Samples that weights are relative to, as to those of a batch; every export scores them on the CPU."""
_MAX_EXPORTS = 12
"""Maximum number of exports that are loaded and score the samples; of more, some evenly spaced ones."""


@dataclass(frozen=True)
class TrackedDocument:
    """A sample, and its weight by each export."""

    source: str
    index: int
    text: str
    weights: list[float]
    """[e]"""

    @property
    def change(self) -> float:
        """The factor by which its weight has changed from the first export to the last."""
        return self.weights[-1] / self.weights[0]


@dataclass(frozen=True)
class WeightHistory:
    """Weights of documents over the exports of a run."""

    iterations: list[int]
    """Iterations of the exports [e]."""
    documents: list[TrackedDocument]
    reference: int
    """Samples that the weights are relative to."""


def exports(folder: Path) -> list[Path]:
    """Return the exports of the run that saved to ``folder``, evenly spaced if there are many, in their order."""
    found = sorted(path for path in (folder / "weighter").glob("iter_*") if (path / MANIFEST).is_file())
    places = np.linspace(0, len(found) - 1, min(len(found), _MAX_EXPORTS)).round().astype(int)
    return [found[place] for place in places]


def weights_over_time(
    folders: Sequence[Path], tokens: torch.Tensor, reference: int, sample_format: SampleTokens
) -> tuple[list[int], np.ndarray]:
    """Score samples with each export, as training does.

    Args:
        folders: folders of the exports.
        tokens: token ids of the samples [d + r, s].
        reference: how many of them, at the end, are the reference samples.
        sample_format: the format of the samples.

    Returns:
        the exports' iterations, and the weights of all samples [d + r, e]; 1 is the mean of the reference samples.

    Raises:
        UserError: an export does not load.
    """
    iterations, columns = [], []
    for folder in tqdm(folders, desc="weighters", unit="export", disable=None):
        found, manifest = read_weighter_folder("--run", str(folder), sample_format, seed=0), read_manifest(folder)
        try:
            iteration, temperature = int(manifest["iteration"]), float(manifest["temperature"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{folder}: its manifest lacks what a run writes ({shortened(error)}); leave it out"
            ) from None
        weighter = Weighter(found.model, WeightingConfig(dwm_mode="off"), torch.device("cpu"), reader=found.reader)
        scores = weighter.score(tokens).double() / temperature
        relative = torch.exp(scores - torch.logsumexp(scores[-reference:], 0))
        iterations.append(iteration)
        columns.append((relative * reference).numpy())
    return iterations, np.stack(columns, axis=1)
