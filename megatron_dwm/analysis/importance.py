"""Importance weights of texts by DSIR: hashed n-grams of a target set against those of all texts (arXiv 2302.03169).

The n-grams are those of the package ``data-selection``. Its own loop over files keeps a list of all weights in memory
and reads only plain JSON lines; here the weight of a single text is computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from megatron_dwm.errors import UserError
from megatron_dwm.extras import require_packages

# The package's own numbers.
_BUCKETS = 10_000
_MOST_NGRAMS = 100_000 * _BUCKETS  # that the distribution of all texts is estimated with
_SMOOTHING = 1e-8


class ImportanceWeights:
    """Logarithms of how much more probable a text is in the target set than among all texts."""

    def __init__(self, texts: Iterable[str], target_texts: Iterable[str]) -> None:
        """Count the n-grams of both.

        Raises:
            UserError: the package is missing, or one of both holds no words.
        """
        require_packages("--method dsir", "data_selection")
        target, everything = self._distribution("--target", target_texts), self._distribution("--input", texts)
        self._log_ratio = np.log(target + _SMOOTHING) - np.log(everything + _SMOOTHING)

    def __call__(self, text: str) -> float:
        """Return the logarithm of a text's importance weight."""
        return float(self._log_ratio @ _count(text, np.zeros(_BUCKETS, np.int64)))

    def _distribution(self, name: str, texts: Iterable[str]) -> Any:
        counts = np.zeros(_BUCKETS, np.int64)
        for text in texts:
            counts = _count(text, counts)
            if name == "--input" and counts.sum() > _MOST_NGRAMS:
                break
        if not counts.any():
            raise UserError(f"{name}: its texts hold no words; give files that hold some")
        return counts / counts.sum()


def _count(text: str, counts: Any) -> Any:
    """Return the counts with those of a text's words and pairs of words added."""
    from data_selection.hashed_ngram_dsir import get_ngram_counts

    return get_ngram_counts(text, num_buckets=_BUCKETS, counts=counts)
