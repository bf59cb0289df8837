"""The n-gram weighter as a transformers model: one score from the n-grams of a sample.

Shape legend: m samples, s sequence length, f n-grams of a sample, h hidden size.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel

from megatron_dwm.weighting.ngram.calibration import Calibration
from megatron_dwm.weighting.ngram.configuration import NgramConfig
from megatron_dwm.weighting.ngram.features import ngram_features


class NgramForSequenceClassification(PreTrainedModel):
    """Scores a sample by its n-grams.

    With hidden size 0 the score is the sum of the buckets' parameters, each times its value in the sample, calibrated
    by a curve. Otherwise the buckets have vectors, and their sum passes through a norm, a layer and a head.
    """

    config_class = NgramConfig
    base_model_prefix = "embedding"
    _supports_sdpa = True  # it has no attention, so that any kind will do

    def __init__(self, config: NgramConfig) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        self.embedding = torch.nn.Embedding(config.ngram_buckets, max(hidden, 1))
        if hidden:
            self.norm = torch.nn.LayerNorm(hidden)
            self.dense = torch.nn.Linear(hidden, hidden)
            self.score = torch.nn.Linear(hidden, 1, bias=False)
        self.calibration = Calibration(config.calibration_points) if config.calibration_points else None
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def is_linear(self) -> bool:
        """Whether the score is linear in the features, but for its calibration, so that there is a closed form."""
        return self.config.hidden_size == 0  # type: ignore[no-any-return]

    @property
    def operations_per_token(self) -> int:
        """Multiply-adds per token; the layers count as if they were applied at every token."""
        layers = sum(param.numel() for name, param in self.named_parameters() if not name.startswith("embedding"))
        return len(self.config.ngram_lengths) * self.embedding.embedding_dim + layers

    def get_input_embeddings(self) -> torch.nn.Module:
        """Return the buckets' vectors."""
        return self.embedding

    def features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return buckets [m, f] and values [m, f] of tokens [m, s]."""
        return ngram_features(input_ids, attention_mask, self.config.ngram_lengths, self.config.ngram_buckets)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **unused: Any
    ) -> SequenceClassifierOutput:
        """Return the scores [m, 1] of tokens [m, s] as ``logits``.

        Args:
            input_ids: tokens [m, s].
            attention_mask: 0 where a token is padding [m, s]; without one, all tokens count.
            **unused: arguments of classifiers of other architectures.
        """
        buckets, values = self.features(input_ids, attention_mask)
        weight = self.embedding.weight
        bag = torch.nn.functional.embedding_bag(buckets, weight, per_sample_weights=values.to(weight), mode="sum")
        if self.calibration is not None:
            bag = self.calibration(bag)
        if not self.is_linear:
            bag = self.score(torch.nn.functional.gelu(self.dense(self.norm(bag))))
        return SequenceClassifierOutput(logits=bag)

    def _init_weights(self, module: torch.nn.Module) -> None:
        if module is self.embedding and self.is_linear:
            torch.nn.init.zeros_(self.embedding.weight)
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call]


def register(modeling_auto: ModuleType) -> None:
    """Register the model with ``AutoModelForSequenceClassification``."""
    modeling_auto.AutoModelForSequenceClassification.register(
        NgramConfig, NgramForSequenceClassification, exist_ok=True
    )
