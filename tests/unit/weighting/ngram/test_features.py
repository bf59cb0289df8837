"""N-grams of a sample: the buckets are those that the documentation promises, once each, without padding."""

from __future__ import annotations

import pytest
import torch

from megatron_dwm.weighting.ngram.features import ngram_buckets, ngram_features


def bucket(tokens: list[int], buckets: int) -> int:
    """The bucket of one n-gram in Python's own integers."""
    hashed = len(tokens)
    for token in tokens:
        hashed = (hashed * 1000003 + token + 1) % 2**32
    hashed = (hashed ^ hashed >> 16) * 73244475 % 2**32
    return (hashed ^ hashed >> 16) % buckets


@pytest.mark.parametrize("length", [1, 2, 3])
def test_buckets_are_those_of_the_documented_hash_for_all_ids(length: int):
    tokens = [0, 1, 256_000, 2**31 - 1, 7, 7, 7, 7]
    found = ngram_buckets(torch.tensor([tokens]), length, 131072).tolist()
    assert found == [[bucket(tokens[place : place + length], 131072) for place in range(len(tokens) - length + 1)]]


def test_the_hash_does_not_change_between_versions():
    assert ngram_buckets(torch.tensor([[1, 2, 3]]), 2, 131072).tolist() == [list((38166, 47782))]


def test_a_bucket_counts_once_and_in_proportion_to_the_length_of_its_ngram():
    buckets, values = ngram_features(torch.tensor([[5, 5, 5, 6]]), None, [1, 2], 10**6)
    found = {int(b): float(v) for b, v in zip(buckets[0], values[0], strict=True) if v > 0}
    unigrams, bigrams = ({bucket(g, 10**6) for g in grams} for grams in ([[5], [6]], [[5, 5], [5, 6]]))
    assert found.keys() == unigrams | bigrams
    assert [found[b] for b in unigrams] == pytest.approx([(1 / 10) ** 0.5] * 2)
    assert [found[b] for b in bigrams] == pytest.approx([(4 / 10) ** 0.5] * 2)


def test_order_counts():
    one, other = (
        dict(zip(*(x[0].tolist() for x in ngram_features(torch.tensor([t]), None, [2], 10**6)), strict=True))
        for t in ([1, 2, 3, 4], [4, 3, 2, 1])
    )
    assert not one.keys() & other.keys()


def test_samples_shorter_than_an_ngram_have_none():
    buckets, values = ngram_features(torch.tensor([[3]]), None, [2, 3], 100)
    assert buckets.shape == values.shape and values.tolist() == [[0.0]]
