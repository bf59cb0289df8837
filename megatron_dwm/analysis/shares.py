"""The sources' shares of the training loss under a run's weights, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dwm.analysis.preference import mean_weight
from megatron_dwm.analysis.records import Record, RunRecords
from megatron_dwm.errors import UserError

_BLOCKS = 20
"""Blocks of iterations that the bootstrap draws from."""
_RESAMPLES = 2000  # draws of the bootstrap
_SEED = 0


@dataclass(frozen=True)
class Shares:
    """Shares of the sources over some iterations; they sum to 1."""

    label: str
    iterations: int
    mean: dict[str, float]
    interval: dict[str, tuple[float, float]]
    """95 percent interval of each share; NaN if there are too few iterations."""


def learned_shares(run: RunRecords) -> list[Shares]:
    """Return the shares over the whole of the weighted training, then stage by stage.

    All iterations count the same, except for those before the first stage, which are left out.

    Raises:
        UserError: the run has no weights.
    """
    learning = _weighted_steps(run)
    found = [_shares("overall", learning, run.sources)]
    stages = sorted({int(step["stage"]) for step in learning if "stage" in step})
    for stage in stages:
        members = [step for step in learning if step.get("stage") == stage]
        found.append(_shares(f"stage {stage}", members, run.sources))
    return found


def learned_weights(run: RunRecords) -> dict[str, float]:
    """Return the mean weight of the samples of each source that has any over the weighted training, by their tokens.

    Raises:
        UserError: the run has no weights.
    """
    steps = _weighted_steps(run)
    weights = {source: mean_weight(source, steps) for source in run.sources}
    return {source: weight for source, weight in weights.items() if weight is not None}


def _weighted_steps(run: RunRecords) -> list[Record]:
    weighted = [step for step in run.steps if step.get("weight_by_source") and step.get("share_by_source")]
    learning = [step for step in weighted if step.get("stage", 1) >= 1]
    if not learning:
        raise UserError("the run recorded no weights of sources; give a run with --dwm-mode bilevel, frozen or rule")
    return learning


def _shares(label: str, steps: Sequence[Record], sources: Sequence[str]) -> Shares:
    values = np.array([[step["share_by_source"].get(source, 0.0) for source in sources] for step in steps])
    mean = values.mean(axis=0) / values.mean(axis=0).sum()
    low, high = _interval(values)
    return Shares(
        label,
        len(steps),
        {source: float(share) for source, share in zip(sources, mean, strict=True)},
        {source: (float(low[i]), float(high[i])) for i, source in enumerate(sources)},
    )


def _interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds of the means [sources] of values [iterations, sources].

    Neighboring iterations have nearly the same weighter, so blocks of iterations are drawn.
    """
    if len(values) < _BLOCKS:
        unknown = np.full(values.shape[1], np.nan)
        return unknown, unknown
    blocks = np.array([part.mean(axis=0) for part in np.array_split(values, _BLOCKS)])
    draws = np.random.default_rng(_SEED).integers(len(blocks), size=(_RESAMPLES, len(blocks)))
    means = blocks[draws].mean(axis=1)
    means /= means.sum(axis=1, keepdims=True)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return low, high
