"""The features of the n-gram weighter: the hashed n-grams of a sample.

An n-gram of token ids is hashed to a bucket by integer arithmetic only, so that every machine and version gets the
same one (:func:`ngram_buckets`). A sample is the set of its buckets: repetitions do not count, so that a repetitive
text has no larger features than others. The set is a vector of Euclidean norm 1, in which a longer n-gram
counts in proportion to its length. ``docs/transfer.md`` shows the same in numpy.

Shape legend: m samples, s sequence length, f n-grams of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

MULTIPLIERS = (1000003, 73244475)
"""Those of CPython's former string hash, and of a common hash of 32-bit integers (0x45d9f3b).

They are small enough for a product with 32 bits to stay within 63.
"""
LOW_32_BITS = 0xFFFFFFFF


def ngram_buckets(tokens: torch.Tensor, length: int, buckets: int) -> torch.Tensor:
    """Return the bucket of each n-gram [m, s - length + 1] of tokens [m, s], int64."""
    num_ngrams = tokens.shape[1] - length + 1
    hashed = torch.full_like(tokens[:, :num_ngrams], length)
    for start in range(length):
        hashed = (hashed * MULTIPLIERS[0] + tokens[:, start : start + num_ngrams] + 1) & LOW_32_BITS
    hashed = ((hashed ^ (hashed >> 16)) * MULTIPLIERS[1]) & LOW_32_BITS
    return (hashed ^ (hashed >> 16)) % buckets


def ngram_features(
    tokens: torch.Tensor, attention_mask: torch.Tensor | None, lengths: Sequence[int], buckets: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the buckets of samples and their values.

    Args:
        tokens: [m, s], int64.
        attention_mask: 0 where a token is padding [m, s]; n-grams with padding in them do not count.
        lengths: lengths of the n-grams.
        buckets: the number of buckets.

    Returns:
        buckets [m, f] and values [m, f], float32; repeated and ignored n-grams have the value 0.
    """
    all_found, all_values = [], []
    for length in (n for n in lengths if n <= tokens.shape[1]):
        found = ngram_buckets(tokens, length, buckets)
        if attention_mask is not None:
            is_whole = attention_mask.bool().unfold(1, length, 1).all(dim=2)
            found = found.masked_fill(~is_whole, buckets)  # sorted behind all others
        found = found.sort(dim=1).values
        is_counted = found < buckets
        is_counted[:, 1:] &= found[:, 1:] != found[:, :-1]
        all_found.append(found.clamp_max(buckets - 1))
        all_values.append(is_counted * (length / max(lengths)))
    if not all_found:  # torch's embedding bag needs a bucket
        return tokens.new_zeros(len(tokens), 1), torch.zeros(len(tokens), 1, device=tokens.device)
    values = torch.cat(all_values, dim=1).float()
    norms = values.square().sum(dim=1, keepdim=True).sqrt()
    return torch.cat(all_found, dim=1), values / norms.clamp_min(1e-12)
