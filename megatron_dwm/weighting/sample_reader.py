"""What a weighter reads instead of a sample's tokens: windows of the tokens, or the text tokenized again.

Shape legend: m samples, s sequence length.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_dwm.weighting.windows import SpecialTokens, Window, cut

SampleReader = Callable[[torch.Tensor], list[list[Window]]]
"""Returns the windows of each of the samples [m, s]."""
MAX_CACHED_TOKENS = 2**25
"""Tokens of texts that are kept: 128 MiB."""


class WindowReader:
    """Cuts samples that are longer than a classifier's maximum length into windows."""

    def __init__(self, window: int) -> None:
        self.window = window

    def __call__(self, tokens: torch.Tensor) -> list[list[Window]]:
        """Return the windows of samples [m, s]."""
        return [cut(ids, self.window, SpecialTokens()) for ids in tokens.tolist()]


class TextReader:
    """Rebuilds the samples' texts, and tokenizes them with the classifier's tokenizer.

    The newest results are cached, because a weighter in training reads a sample several times.
    """

    def __init__(
        self,
        text_of: Callable[[npt.NDArray[np.integer[Any]]], str],
        tokenizer: Any,
        window: int | None,
        max_cached_tokens: int = MAX_CACHED_TOKENS,
    ) -> None:
        """
        Args:
            text_of: returns the text of a sample's tokens [s].
            tokenizer: the classifier's, of Hugging Face.
            window: maximum number of tokens that the classifier reads at once; None for any number.
        """
        # Data loaders fork after tokenizing has begun, and the tokenizer's threads would not survive the fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.text_of, self.tokenizer, self.window = text_of, tokenizer, window
        self.special = SpecialTokens.of(tokenizer)
        self._cached: OrderedDict[bytes, npt.NDArray[np.int32]] = OrderedDict()
        self._max_cached_tokens, self._cached_tokens = max_cached_tokens, 0

    def __call__(self, tokens: torch.Tensor) -> list[list[Window]]:
        """Return the windows of samples [m, s]."""
        samples = tokens.cpu().numpy()
        keys = [sample_key(sample) for sample in samples]
        found = {key: self._cached[key] for key in keys if key in self._cached}
        missing = {key: sample for key, sample in zip(keys, samples, strict=True) if key not in found}
        if missing:
            texts = [self.text_of(sample) for sample in missing.values()]
            encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            found |= {key: np.array(ids, np.int32) for key, ids in zip(missing, encoded, strict=True)}
        for key in dict.fromkeys(keys):
            self._keep(key, found[key])
        return [cut(found[key].tolist(), self.window, self.special) for key in keys]

    def _keep(self, key: bytes, ids: npt.NDArray[np.int32]) -> None:
        """Add a sample's ids to the cache, and drop the oldest."""
        if key not in self._cached:
            self._cached_tokens += len(ids)
        self._cached[key] = ids
        self._cached.move_to_end(key)
        while self._cached_tokens > self._max_cached_tokens and len(self._cached) > 1:
            self._cached_tokens -= len(self._cached.popitem(last=False)[1])


def sample_key(sample: npt.NDArray[np.integer[Any]]) -> bytes:
    """Return a digest of a sample's tokens [s], by which the same sample is recognized."""
    return hashlib.blake2b(sample.astype("<i8").tobytes(), digest_size=8).digest()
