"""What a weighter prefers: statistics of the weights that a run has recorded.

A weight is N times the sample's weight in its batch of N: 1 is the weight of a sample when all count alike.

Shape legend: n samples.
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
class WeightedSamples:
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

    def where(self, rows: np.ndarray) -> WeightedSamples:
        """Return some of the samples, given by a mask [n] or by row numbers."""
        names = ("iteration", "stage", "index", "source", "weight", "alignment")
        columns = {name: getattr(self, name)[rows] for name in names}
        return WeightedSamples(**columns, properties={name: values[rows] for name, values in self.properties.items()})

    @property
    def stages(self) -> list[int]:
        """Numbers of the stages that the samples are from."""
        return sorted({int(stage) for stage in self.stage})


def weighted_samples(updates: Sequence[Record]) -> WeightedSamples:
    """Return the samples of a run's ``outer_update`` records; ``loss`` is a property if every record has it."""

    def column(name: str, kind: type) -> np.ndarray:
        return np.array([value for update in updates for value in update["samples"][name]], dtype=kind)

    def repeated(name: str) -> np.ndarray:
        return np.array([u[name] for u in updates for _ in u["samples"]["index"]], dtype=int)

    batches = [standardized(update["samples"]["alignment"]) for update in updates]
    has_loss = bool(updates) and all("loss" in update["samples"] for update in updates)
    return WeightedSamples(
        iteration=repeated("iteration"),
        stage=repeated("stage"),
        index=column("index", int),
        source=column("source", str),
        weight=column("weight", float),
        alignment=np.concatenate(batches) if batches else np.empty(0),
        properties={"loss": column("loss", float)} if has_loss else {},
    )


def standardized(values: Sequence[float]) -> np.ndarray:
    """Return the values shifted and scaled to mean 0 and variance 1; all 0 if they do not differ."""
    array: np.ndarray = np.asarray(values, dtype=float)
    if len(array) == 0 or array.max() == array.min():
        return np.zeros_like(array)
    scaled: np.ndarray = (array - array.mean()) / array.std()
    return scaled


def evenly_spaced_updates(updates: Sequence[Record], samples_per_stage: int) -> list[Record]:
    """Choose updates of each stage, evenly spaced, that hold ``samples_per_stage`` samples together; at least one."""
    chosen: list[Record] = []
    for _, group in groupby(updates, key=lambda update: update["stage"]):
        of_stage = list(group)
        number = min(len(of_stage), max(1, samples_per_stage // len(of_stage[0]["samples"]["index"])))
        chosen += [of_stage[place] for place in np.linspace(0, len(of_stage) - 1, number).round().astype(int)]
    return chosen


@dataclass(frozen=True)
class SourceFigures:
    """How one data source was weighted in one stage."""

    weight: float | None
    """Mean weight of its samples."""
    loss_fraction: float
    """Its samples' fraction of the trained loss, and so of the gradient; mean over the steps."""
    sample_fraction: float | None
    """Its samples' fraction of the batches, as they count without weights: by their tokens."""
    alignment: float | None
    """Mean standardized alignment of its samples at the outer updates."""


def stage_sources(steps: Sequence[Record], samples: WeightedSamples) -> dict[int, dict[str, SourceFigures]]:
    """Return the figures of each data source by stage.

    A step records each source's fraction of the loss and the mean weight of its samples. The two give its samples'
    fraction of the batch, so that a mean over steps counts every sample once.
    """
    names = list(dict.fromkeys(name for step in steps for name in step.get("share_by_source", ())))
    figures: dict[int, dict[str, SourceFigures]] = {}
    for stage in sorted({step["stage"] for step in steps if "stage" in step}):
        of_stage = [step for step in steps if step.get("stage") == stage]
        rows = samples.where(samples.stage == stage)
        figures[stage] = {name: _source_figures(name, of_stage, rows) for name in names}
    return figures


def _source_figures(name: str, steps: Sequence[Record], samples: WeightedSamples) -> SourceFigures:
    of_loss = [step.get("share_by_source", {}).get(name, 0.0) for step in steps]
    weights = [step.get("weight_by_source", {}).get(name, 1.0) for step in steps]
    of_samples = [fraction / weight for fraction, weight in zip(of_loss, weights, strict=True) if weight > 0]
    aligned = samples.alignment[samples.source == name]
    return SourceFigures(
        weight=sum(of_loss) / sum(of_samples) if sum(of_samples) > 0 else None,
        loss_fraction=float(np.mean(of_loss)),
        sample_fraction=float(np.mean(of_samples)) if of_samples else None,
        alignment=float(aligned.mean()) if len(aligned) else None,
    )


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1 [n]; equal values have the mean of theirs."""
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


def correlation_within(groups: np.ndarray, first: np.ndarray, second: np.ndarray) -> float | None:
    """Return the mean of the groups' rank correlations, weighted by their sizes; None if no group has one."""
    masks = [groups == group for group in np.unique(groups)]
    found = [(rank_correlation(first[mask], second[mask]), mask.sum()) for mask in masks]
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
    """Among samples of the same source, mean over the sources: what the weight depends on besides the source."""


def correlations(samples: WeightedSamples, values: np.ndarray) -> dict[int, Correlations]:
    """Return the correlations of the weight with ``values`` [n] by stage."""
    found = {}
    for stage in samples.stages:
        in_stage = samples.stage == stage
        rows, property_values = samples.where(in_stage), values[in_stage]
        found[stage] = Correlations(
            in_batch=correlation_within(rows.iteration, rows.weight, property_values),
            in_source=correlation_within(rows.source, rows.weight, property_values),
        )
    return found


@dataclass(frozen=True)
class Quarter:
    """About a quarter of the samples, by one property."""

    low: float
    high: float
    """Least and largest value in it."""
    weight: float
    """Mean weight."""
    fraction: float
    """Of all samples."""


def quarters(values: np.ndarray, weights: np.ndarray) -> list[Quarter]:
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
            found.append(Quarter(low, high, weight=float(weights[mask].mean()), fraction=float(mask.mean())))
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


def distinct(tokens: Sequence[int], n: int) -> float:
    """Return the number of different n-grams as a fraction of all: 1 if none repeats; NaN without any."""
    grams = _grams(tokens, n)
    return len(set(grams)) / len(grams) if grams else float("nan")


def tfidf_similarity(samples: Sequence[Sequence[int]], target: Sequence[Sequence[int]], n: int) -> np.ndarray:
    """Return the cosine of each sample's TF-IDF vector of n-grams with the mean vector of the target samples [n].

    The document frequencies df are those of samples and target together, D texts, smoothed by one:
    log((1 + D) / (1 + df)) + 1. Vectors have length 1 before the target's are averaged.
    """
    counted = [Counter(_grams(tokens, n)) for tokens in (*samples, *target)]
    frequency = Counter(gram for counts in counted for gram in counts)
    numbers = {gram: number for number, gram in enumerate(frequency)}
    idf = np.log((1 + len(counted)) / (1 + np.array([frequency[gram] for gram in numbers], dtype=float))) + 1

    def vector(counts: Counter[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
        """Return the places of the entries that are not 0, and the entries."""
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
