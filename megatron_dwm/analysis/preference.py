"""What a weighter prefers: statistics of the weights that a run has recorded.

Weights are relative, u = N w: 1 is the weight of a sample when all count alike. Shape legend: n samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from megatron_dwm.analysis.records import Record

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class WeighedSamples:
    """The samples of outer updates, a row each, in the order of the records."""

    iteration: np.ndarray
    stage: np.ndarray
    index: np.ndarray
    """Place in the training dataset."""
    source: np.ndarray
    weight: np.ndarray
    alignment: np.ndarray
    """Standardized within the batch: how many standard deviations above its mean."""
    properties: dict[str, np.ndarray] = field(default_factory=dict)
    """Numbers that describe the samples, by name [n]; NaN where one is not known."""

    def __len__(self) -> int:
        return len(self.weight)

    def where(self, rows: np.ndarray) -> WeighedSamples:
        """Some of the samples: a mask [n] or row numbers."""
        names = ("iteration", "stage", "index", "source", "weight", "alignment")
        columns = {name: getattr(self, name)[rows] for name in names}
        return WeighedSamples(**columns, properties={name: values[rows] for name, values in self.properties.items()})

    @property
    def stages(self) -> list[int]:
        return sorted({int(stage) for stage in self.stage})


def weighed_samples(updates: Sequence[Record]) -> WeighedSamples:
    """The samples of a run's ``outer_update`` records; ``loss`` is a property if every record has it."""

    def column(name: str, kind: type) -> np.ndarray:
        return np.array([value for update in updates for value in update["samples"][name]], dtype=kind)

    def repeated(name: str) -> np.ndarray:
        return np.array([u[name] for u in updates for _ in u["samples"]["index"]], dtype=int)

    batches = [standardized(update["samples"]["alignment"]) for update in updates]
    has_loss = bool(updates) and all("loss" in update["samples"] for update in updates)
    return WeighedSamples(
        iteration=repeated("iteration"),
        stage=repeated("stage"),
        index=column("index", int),
        source=column("source", str),
        weight=column("weight", float),
        alignment=np.concatenate(batches) if batches else np.empty(0),
        properties={"loss": column("loss", float)} if has_loss else {},
    )


def standardized(values: Sequence[float]) -> np.ndarray:
    """Mean 0 and variance 1; all 0 if the values do not differ."""
    array = np.asarray(values, dtype=float)
    if len(array) == 0 or array.max() == array.min():
        return np.zeros_like(array)
    return (array - array.mean()) / array.std()


def evenly_spaced_updates(updates: Sequence[Record], samples_per_stage: int) -> list[Record]:
    """Of each stage so many whole updates, evenly spaced, as hold ``samples_per_stage`` samples; one at least."""
    chosen: list[Record] = []
    for _, group in groupby(updates, key=lambda update: update["stage"]):
        own = list(group)
        number = min(len(own), max(1, samples_per_stage // len(own[0]["samples"]["index"])))
        chosen += [own[place] for place in np.linspace(0, len(own) - 1, number).round().astype(int)]
    return chosen


@dataclass(frozen=True)
class SourceFigures:
    """What one data source was worth in one stage."""

    weight: float | None
    """Mean relative weight of its samples."""
    fraction: float
    """Part of the batches' gradient, Σ w over its samples, mean over the steps."""
    part: float | None
    """Part of the batches' samples."""
    alignment: float | None
    """Mean standardized alignment of its samples at the outer updates."""


def stage_sources(steps: Sequence[Record], samples: WeighedSamples) -> dict[int, dict[str, SourceFigures]]:
    """Figures of each data source by stage.

    A step records the share of each source and its samples' mean weight; the two give the number of its samples,
    so that a mean over steps counts every sample once.
    """
    names = list(dict.fromkeys(name for step in steps for name in step.get("share_by_source", ())))
    figures: dict[int, dict[str, SourceFigures]] = {}
    for stage in sorted({step["stage"] for step in steps if "stage" in step}):
        own = [step for step in steps if step.get("stage") == stage]
        rows = samples.where(samples.stage == stage)
        figures[stage] = {name: _source_figures(name, own, rows) for name in names}
    return figures


def _source_figures(name: str, steps: Sequence[Record], samples: WeighedSamples) -> SourceFigures:
    shares = [step["share_by_source"].get(name, 0.0) for step in steps]
    weights = [step.get("weight_by_source", {}).get(name, 1.0) for step in steps]
    parts = [fraction / weight for fraction, weight in zip(shares, weights, strict=True) if weight > 0]
    aligned = samples.alignment[samples.source == name]
    return SourceFigures(
        weight=sum(shares) / sum(parts) if sum(parts) > 0 else None,
        fraction=float(np.mean(shares)),
        part=float(np.mean(parts)) if parts else None,
        alignment=float(aligned.mean()) if len(aligned) else None,
    )


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 [n]; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Spearman's ρ of two columns [n]; None if one does not vary. Rows with a NaN are left out."""
    known = ~(np.isnan(first) | np.isnan(second))
    a, b = ranks(first[known]), ranks(second[known])
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def correlation_within(groups: np.ndarray, first: np.ndarray, second: np.ndarray) -> float | None:
    """Mean of the groups' rank correlations, each counted by its size; None if none of them has one."""
    found = [(rank_correlation(first[own], second[own]), own.sum()) for own in (groups == g for g in np.unique(groups))]
    known = [(rho, size) for rho, size in found if rho is not None]
    if not known:
        return None
    return float(np.average([rho for rho, _ in known], weights=[size for _, size in known]))


@dataclass(frozen=True)
class Correlations:
    """Rank correlations of the weight with one property in one stage."""

    in_batch: float | None
    """Within each batch, mean over the stage's batches: weights compare samples of one batch."""
    in_source: float | None
    """Among samples of the same source, mean over the sources: what is left where the source tells nothing."""


def correlations(samples: WeighedSamples, values: np.ndarray) -> dict[int, Correlations]:
    """Correlations of the weight with ``values`` [n] by stage."""
    found = {}
    for stage in samples.stages:
        own = samples.stage == stage
        rows, property_values = samples.where(own), values[own]
        found[stage] = Correlations(
            in_batch=correlation_within(rows.iteration, rows.weight, property_values),
            in_source=correlation_within(rows.source, rows.weight, property_values),
        )
    return found


@dataclass(frozen=True)
class Quarter:
    """About a quarter of samples, by one property."""

    low: float
    high: float
    """Least and largest value in it."""
    weight: float
    """Mean weight."""
    part: float
    """Of all samples."""


def quarters(values: np.ndarray, weights: np.ndarray) -> list[Quarter]:
    """Samples parted at the quartiles of ``values`` [n], lowest first.

    Equal values stay together: up to four different values are a part each, and the parts can be uneven.
    """
    known = ~np.isnan(values)
    values, weights = values[known], weights[known]
    if len(values) == 0:
        return []
    different = np.unique(values)
    limits = different[:-1] if len(different) <= 4 else np.quantile(values, (0.25, 0.5, 0.75))
    part = np.searchsorted(limits, values, side="left")
    found = []
    for number in range(4):
        own = part == number
        if own.any():
            inside = values[own]
            size = float(own.mean())
            found.append(Quarter(float(inside.min()), float(inside.max()), float(weights[own].mean()), size))
    return found


def weight_quantiles(update: Record) -> list[float]:
    """Quantiles (``QUANTILES``) of one update's weights."""
    return [float(value) for value in np.quantile(update["samples"]["weight"], QUANTILES)]


def extremes(samples: WeighedSamples, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the ``number`` highest weights, highest first, and of the lowest, lowest first; none is in both.

    A sample that was seen several times is shown once.
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


def distinct(tokens: Sequence[int], n: int) -> float:
    """Different n-grams as a part of all n-grams: 1 if none repeats; NaN without any."""
    grams = _grams(tokens, n)
    return len(set(grams)) / len(grams) if grams else float("nan")


def tfidf_similarity(samples: Sequence[Sequence[int]], target: Sequence[Sequence[int]], n: int) -> np.ndarray:
    """Cosine of each sample's TF-IDF vector of token n-grams with the mean TF-IDF vector of the target samples [n].

    The document frequencies are those of samples and target together, smoothed by one: log((1 + D) / (1 + df)) + 1.
    Vectors have length 1 before the target's are averaged.
    """
    counted = [Counter(_grams(tokens, n)) for tokens in (*samples, *target)]
    frequency = Counter(gram for counts in counted for gram in counts)
    numbers = {gram: number for number, gram in enumerate(frequency)}
    idf = np.log((1 + len(counted)) / (1 + np.array([frequency[gram] for gram in numbers], dtype=float))) + 1

    def vector(counts: Counter) -> tuple[np.ndarray, np.ndarray]:
        """Places and values of what is not 0."""
        places = np.array([numbers[gram] for gram in counts], dtype=int)
        values = np.array(list(counts.values()), dtype=float) * idf[places]
        norm = np.linalg.norm(values)
        return places, values / norm if norm else values

    profile = np.zeros(len(numbers))
    for counts in counted[len(samples) :]:
        places, values = vector(counts)
        profile[places] += values
    norm = np.linalg.norm(profile)
    if norm == 0:
        return np.full(len(samples), np.nan)
    vectors = [vector(counts) for counts in counted[: len(samples)]]
    return np.array([float(values @ profile[places]) / norm for places, values in vectors])


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))
