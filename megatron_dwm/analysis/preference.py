"""Statistics of the recorded weights of a run: what its weighter prefers.

A weight is N times the sample's weight in its batch of N: 1 is the weight of a sample when all count alike.

Shape legend: n samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from megatron_dwm.analysis.records import Record
from megatron_dwm.analysis.uncertainty import Estimate, mean_correlation, mean_over_updates

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_UPDATES_PER_STAGE = 40
"""Minimum number of updates that describe a stage, even if their batches are large."""
_MIN_SAMPLES_OF_A_SOURCE = 10
"""Minimum number of samples of a source for a correlation."""


@dataclass(frozen=True)
class WeightedSamples:
    """The samples of outer updates, a row each, in the order of the records."""

    iteration: np.ndarray
    stage: np.ndarray
    index: np.ndarray
    """Place in the training dataset."""
    source: np.ndarray
    weight: np.ndarray
    alignment: np.ndarray
    """Standardized within the batch: standard deviations above its mean."""
    properties: dict[str, np.ndarray] = field(default_factory=dict)
    """Numbers that describe the samples, by name [n]; NaN where one is not known."""

    def __len__(self) -> int:
        return len(self.weight)

    def select(self, rows: np.ndarray) -> WeightedSamples:
        """Return some of the samples, given by a mask [n] or by row numbers."""
        names = ("iteration", "stage", "index", "source", "weight", "alignment")
        columns = {name: getattr(self, name)[rows] for name in names}
        return WeightedSamples(**columns, properties={name: values[rows] for name, values in self.properties.items()})

    @property
    def stages(self) -> list[int]:
        """Numbers of the stages that the samples are from."""
        return sorted({int(stage) for stage in self.stage})


def weighted_samples(updates: Sequence[Record], max_samples: Sequence[int] | None = None) -> WeightedSamples:
    """Return the samples of a run's ``outer_update`` records; ``loss`` is a property if every record has it.

    Args:
        updates: the records.
        max_samples: how many samples to take of each update, drawn at random if it has more; None takes all.
    """
    batches = [standardized(update["samples"]["alignment"]) for update in updates]
    limits = max_samples if max_samples is not None else [len(batch) for batch in batches]
    rows = [_drawn(len(batch), limit) for batch, limit in zip(batches, limits, strict=True)]

    def column(name: str, kind: type) -> np.ndarray:
        taken = zip(updates, rows, strict=True)
        return np.array([update["samples"][name][row] for update, of_update in taken for row in of_update], dtype=kind)

    def repeated(name: str) -> np.ndarray:
        return np.array([u[name] for u, of_update in zip(updates, rows, strict=True) for _ in of_update], dtype=int)

    has_loss = bool(updates) and all("loss" in update["samples"] for update in updates)
    aligned = [batch[of_update] for batch, of_update in zip(batches, rows, strict=True)]
    return WeightedSamples(
        iteration=repeated("iteration"),
        stage=repeated("stage"),
        index=column("index", int),
        source=column("source", str),
        weight=column("weight", float),
        alignment=np.concatenate(aligned) if aligned else np.empty(0),
        properties={"loss": column("loss", float)} if has_loss else {},
    )


def described_samples(updates: Sequence[Record], samples_per_stage: int) -> WeightedSamples:
    """Choose samples of each stage, from as many updates as the number of samples allows.

    Updates are evenly spaced. Of large batches a part is drawn, so that a stage is described by many updates.
    """
    chosen: list[Record] = []
    max_samples: list[int] = []
    for _, group in groupby(updates, key=lambda update: update["stage"]):
        of_stage = list(group)
        whole = samples_per_stage // len(of_stage[0]["samples"]["index"])
        number = min(len(of_stage), max(whole, _UPDATES_PER_STAGE), samples_per_stage)
        places = np.linspace(0, len(of_stage) - 1, number).round().astype(int)
        chosen += [of_stage[place] for place in places]
        max_samples += [samples_per_stage // number] * number
    return weighted_samples(chosen, max_samples)


def _drawn(length: int, max_length: int) -> np.ndarray:
    """Return at most ``max_length`` positions in order, always the same ones.

    They are random, because blended sources alternate, and evenly spaced positions could all be of one source.
    """
    if length <= max_length:
        return np.arange(length)
    return np.sort(np.random.default_rng(0).permutation(length)[:max_length])


def standardized(values: Sequence[float]) -> np.ndarray:
    """Return the values shifted and scaled to mean 0 and variance 1; all 0 if they do not differ."""
    array: np.ndarray = np.asarray(values, dtype=float)
    if len(array) == 0 or array.max() == array.min():
        return np.zeros_like(array)
    scaled: np.ndarray = (array - array.mean()) / array.std()
    return scaled


@dataclass(frozen=True)
class SourceFigures:
    """The weights of one data source in one stage."""

    weight: float | None
    """Mean weight of its samples."""
    loss_fraction: float
    """Its samples' fraction of the training loss, and so of the gradient; mean over the steps."""
    sample_fraction: float | None
    """Its samples' fraction of the batches, as they count without weights: by their tokens."""
    alignment: Estimate
    """Mean standardized alignment of its samples at the outer updates."""


@dataclass(frozen=True)
class SourceAlignments:
    """Mean alignment of each source's samples in each update."""

    iterations: np.ndarray
    """Iterations of the updates [u]."""
    sources: list[str]
    mean: np.ndarray
    """Mean per update and source [u, s]; NaN where an update has no sample of the source."""
    count: np.ndarray
    """Samples of the source in the update [u, s]."""

    def of(self, source: str) -> Estimate:
        """Return the mean alignment of a source's samples."""
        column = self.sources.index(source)
        known = self.count[:, column] > 0
        return mean_over_updates(self.mean[known, column].tolist(), self.count[known, column].tolist())

    def difference(self, first: str, second: str, comparisons: int = 1) -> Estimate:
        """Return how much more one source's samples are aligned than another's, in updates that have both.

        Args:
            comparisons: how many pairs of sources are compared.
        """
        a, b = self.sources.index(first), self.sources.index(second)
        fewer = np.minimum(self.count[:, a], self.count[:, b])
        known = fewer > 0
        differences = (self.mean[:, a] - self.mean[:, b])[known].tolist()
        return mean_over_updates(differences, fewer[known].tolist(), comparisons)


def source_alignments(samples: WeightedSamples, sources: Sequence[str]) -> SourceAlignments:
    """Return the mean alignments of sources by update."""
    iterations, update = np.unique(samples.iteration, return_inverse=True)
    shape = len(iterations), len(sources)
    mean, count = np.full(shape, np.nan), np.zeros(shape, int)
    for column, source in enumerate(sources):
        rows = samples.source == source
        count[:, column] = np.bincount(update[rows], minlength=len(iterations))
        totals = np.bincount(update[rows], samples.alignment[rows], minlength=len(iterations))
        np.divide(totals, count[:, column], out=mean[:, column], where=count[:, column] > 0)
    return SourceAlignments(iterations, list(sources), mean, count)


def stage_sources(steps: Sequence[Record], samples: WeightedSamples) -> dict[int, dict[str, SourceFigures]]:
    """Return the figures of each data source by stage; a mean over steps counts every token once."""
    names = list(dict.fromkeys(name for step in steps for name in step.get("share_by_source", ())))
    figures: dict[int, dict[str, SourceFigures]] = {}
    for stage in sorted({step["stage"] for step in steps if "stage" in step}):
        of_stage = [step for step in steps if step.get("stage") == stage]
        aligned = source_alignments(samples.select(samples.stage == stage), names)
        figures[stage] = {name: _source_figures(name, of_stage, aligned) for name in names}
    return figures


def _source_figures(name: str, steps: Sequence[Record], aligned: SourceAlignments) -> SourceFigures:
    of_loss = [step.get("share_by_source", {}).get(name, 0.0) for step in steps]
    of_samples = [fraction for step in steps if (fraction := _sample_fraction(step, name)) is not None]
    return SourceFigures(
        weight=mean_weight(name, steps),
        loss_fraction=float(np.mean(of_loss)),
        sample_fraction=float(np.mean(of_samples)) if of_samples else None,
        alignment=aligned.of(name),
    )


def mean_weight(name: str, steps: Sequence[Record]) -> float | None:
    """Return the mean weight of a source's samples over some steps, by their tokens; None if there are none of it."""
    pairs = [(step.get("share_by_source", {}).get(name, 0.0), _sample_fraction(step, name)) for step in steps]
    known = [(share, fraction) for share, fraction in pairs if fraction is not None]
    of_samples = sum(fraction for _, fraction in known)
    return sum(share for share, _ in known) / of_samples if of_samples > 0 else None


def _sample_fraction(step: Record, name: str) -> float | None:
    """Return a source's fraction of a step's samples, by their tokens; None if the record does not say.

    Older records hold only its fraction of the loss and its samples' mean weight, and nothing where that is 0.
    """
    if "fraction_by_source" in step:
        return float(step["fraction_by_source"].get(name, 0.0))
    weight = step.get("weight_by_source", {}).get(name, 1.0)
    return step.get("share_by_source", {}).get(name, 0.0) / weight if weight > 0 else None


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1 [n]; equal values get the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    of_values: np.ndarray = (last - (counts - 1) / 2)[inverse]
    return of_values


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Return Spearman's ρ of two columns [n]; None if one does not vary. Rows with a NaN are left out."""
    known = ~(np.isnan(first) | np.isnan(second))
    a, b = ranks(first[known]), ranks(second[known])
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


@dataclass(frozen=True)
class Correlations:
    """Rank correlations of the weight with one property in one stage."""

    in_batch: Estimate
    """Within each batch, mean over the stage's batches: weights compare samples of one batch."""
    in_source: Estimate
    """Among samples of the same source, mean over the sources: what the weight depends on besides the source."""


def correlations(samples: WeightedSamples, values: np.ndarray) -> dict[int, Correlations]:
    """Return the correlations of the weight with ``values`` [n] by stage."""
    found = {}
    for stage in samples.stages:
        in_stage = samples.stage == stage
        rows, of_rows = samples.select(in_stage), values[in_stage]
        batches = _correlations_by(rows.iteration, rows.weight, of_rows, min_rows=2)
        sources = _correlations_by(rows.source, rows.weight, of_rows, min_rows=_MIN_SAMPLES_OF_A_SOURCE)
        found[stage] = Correlations(
            in_batch=mean_over_updates(*batches),
            in_source=mean_correlation(*sources, updates=len(batches[0])),
        )
    return found


def _correlations_by(
    groups: np.ndarray, first: np.ndarray, second: np.ndarray, min_rows: int
) -> tuple[list[float], list[int]]:
    """Return ρ and the size of each group of at least ``min_rows`` rows, if it has a ρ."""
    rhos, sizes = [], []
    for group in np.unique(groups):
        mask = (groups == group) & ~np.isnan(second)
        rho = rank_correlation(first[mask], second[mask]) if mask.sum() >= min_rows else None
        if rho is not None:
            rhos.append(rho)
            sizes.append(int(mask.sum()))
    return rhos, sizes


@dataclass(frozen=True)
class QuartileGroup:
    """The samples between two quartiles of a property."""

    low: float
    high: float
    """Least and largest value in it."""
    weight: float
    """Mean weight."""
    error: float
    """Standard error of the mean weight."""
    n: int
    """Samples in it."""
    fraction: float
    """Its fraction of all samples."""


def quartile_groups(values: np.ndarray, weights: np.ndarray) -> list[QuartileGroup]:
    """Divide the samples at the quartiles of ``values`` [n], lowest first.

    Equal values stay together: of up to four different values each is a group, and the groups can be uneven.
    """
    known = ~np.isnan(values)
    values, weights = values[known], weights[known]
    if len(values) == 0:
        return []
    different = np.unique(values)
    limits = different[:-1] if len(different) <= 4 else np.quantile(values, (0.25, 0.5, 0.75))
    group = np.searchsorted(limits, values, side="left")
    found = []
    for number in range(4):
        mask = group == number
        if mask.any():
            inside = values[mask]
            low, high = float(inside.min()), float(inside.max())
            of_group, n = weights[mask], int(mask.sum())
            error = float(of_group.std() / n**0.5)
            found.append(QuartileGroup(low, high, float(of_group.mean()), error, n, fraction=float(mask.mean())))
    return found


def weight_quantiles(update: Record) -> list[float]:
    """Return the quantiles (``QUANTILES``) of one update's weights."""
    weights = np.array(update["samples"]["weight"], dtype=float)
    return [float(value) for value in np.quantile(weights, QUANTILES)]


def extremes(samples: WeightedSamples, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of the ``number`` highest weights, highest first, and of the lowest, lowest first; none is in both.

    A sample that was seen several times is chosen once.
    """
    order = np.argsort(samples.weight, kind="stable")
    number = min(number, len({int(index) for index in samples.index}) // 2)

    def first_different(rows: np.ndarray, taken: set[int]) -> np.ndarray:
        chosen: list[int] = []
        for row in rows:
            if len(chosen) < number and int(samples.index[row]) not in taken:
                taken.add(int(samples.index[row]))
                chosen.append(int(row))
        return np.array(chosen, dtype=int)

    taken: set[int] = set()
    highest = first_different(order[::-1], taken)
    return highest, first_different(order, taken)
