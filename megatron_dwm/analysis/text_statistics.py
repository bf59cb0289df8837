"""Statistics of texts as tokens: their repetition, and their similarity to a target set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np


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
