"""The configuration of the n-gram weighter, in transformers' form."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from megatron_dwm.weighting.ngram import MODEL_TYPE


class NgramConfig(PreTrainedConfig):
    """Sizes of an n-gram weighter."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        vocab_size: int = 32000,
        ngram_lengths: Sequence[int] = (1, 2),
        ngram_buckets: int = 131072,
        hidden_size: int = 0,
        calibration_points: int = 0,
        initializer_range: float = 0.1,
        **others: Any,
    ) -> None:
        """
        Args:
            vocab_size: size of the vocabulary.
            ngram_lengths: lengths of the n-grams that are read.
            ngram_buckets: number of buckets that n-grams are hashed to.
            hidden_size: width of the embedding and of the layer above it; 0 for a linear model with one parameter per
                bucket.
            calibration_points: points of the curve that calibrates a linear model's scores, at least 2; 0 for none.
            initializer_range: standard deviation of the initial embeddings; linear models start at 0.
            **others: parameters of every configuration.
        """
        self.vocab_size, self.ngram_lengths, self.ngram_buckets = vocab_size, list(ngram_lengths), ngram_buckets
        self.hidden_size, self.calibration_points = hidden_size, calibration_points
        self.initializer_range = initializer_range
        super().__init__(**others)


def register(configuration_auto: ModuleType) -> None:
    """Register the configuration with ``AutoConfig``."""
    configuration_auto.CONFIG_MAPPING.register(MODEL_TYPE, NgramConfig, exist_ok=True)
