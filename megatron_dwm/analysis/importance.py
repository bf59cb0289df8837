"""Importance weights of texts by DSIR: hashed n-grams of a target set against those of all texts (arXiv 2302.03169).

The n-grams are those of the package ``data-selection``. Its own loop over files keeps a list of all weights in memory
and reads plain JSON lines only. Here each task counts the n-grams of its part, and a text is mapped to a number.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from megatron_dwm.errors import UserError

# The package's numbers.
_BUCKETS = 10_000
MAX_NGRAMS = 100_000 * _BUCKETS
"""Number of texts from which the distribution of all texts is estimated."""
_SMOOTHING = 1e-8


class ImportanceWeights:
    """Logarithms of how much more probable a text is in the target set than among all texts."""

    def __init__(self, everything: Any, target: Any) -> None:
        """
        Args:
            everything: counts of n-grams in all texts, or in a large part of them.
            target: counts of n-grams in the target set.

        Raises:
            UserError: one of them contains no words.
        """
        for name, counts in (("--input", everything), ("--target", target)):
            if not counts.any():
                raise UserError(f"{name}: its texts contain no words; give other files")
        self._log_ratio = np.log(target / target.sum() + _SMOOTHING) - np.log(
            everything / everything.sum() + _SMOOTHING
        )

    def __call__(self, text: str) -> float:
        """Return the logarithm of a text's importance weight."""
        return float(self._log_ratio @ _count(text, np.zeros(_BUCKETS, np.int64)))


def ngram_counts(texts: Iterable[str], max_ngrams: float) -> Any:
    """Return the counts of hashed n-grams in texts, of the first ``max_ngrams`` of them."""
    counts = np.zeros(_BUCKETS, np.int64)
    for text in texts:
        counts = _count(text, counts)
        if counts.sum() > max_ngrams:
            break
    return counts


def _count(text: str, counts: Any) -> Any:
    """Return the counts with those of a text's words and pairs of words added."""
    from data_selection.hashed_ngram_dsir import get_ngram_counts

    return get_ngram_counts(text, num_buckets=_BUCKETS, counts=counts)
