"""Statistics of texts against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_dwm.analysis.text_statistics import distinct, tfidf_similarity


def test_distinct_n_grams():
    assert distinct([1, 2, 1, 2], 1) == 0.5 and distinct([1, 2, 1, 2], 2) == pytest.approx(2 / 3)
    assert distinct([4, 5, 6], 2) == 1.0 and math.isnan(distinct([4], 2))


def test_tfidf_similarity_by_hand():
    samples, target = [[1, 1, 2], [3], []], [[1, 2]]
    found = tfidf_similarity(samples, target, 1)
    # Token 1 and token 2 are in 2 of 4 texts: the same idf, which falls out of the cosine of (2, 1) and (1, 1).
    assert found[0] == pytest.approx(3 / math.sqrt(5 * 2))
    assert found[1] == 0.0 and found[2] == 0.0
    # A rare token counts for more: idf of 1 in 2 of 3 texts, of 2 in 1 of 3.
    common, rare = math.log(4 / 3) + 1, math.log(4 / 2) + 1
    found = tfidf_similarity([[1], [3]], [[1, 2]], 1)
    assert found[0] == pytest.approx(common / math.hypot(common, rare))


def test_similarity_of_pairs_knows_the_order():
    found = tfidf_similarity([[1, 2, 3], [3, 2, 1]], [[1, 2, 3, 1, 2]], 2)
    assert found[0] > 0.5 and found[1] == 0.0
    assert np.isnan(tfidf_similarity([[1, 2]], [], 2)).all()
