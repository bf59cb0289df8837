"""A small classifier for tests of scoring, and texts that it reads."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast


def save_classifier_of_numbers(folder: Path) -> Path:
    """Write a classifier of random weights over numbers as words; token 50 pads, and is in no text."""
    words = Tokenizer(models.WordLevel({str(number): number for number in range(51)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="50").save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=51, max_position_embeddings=64, num_labels=1, pad_token_id=50, **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def numbers(seed: int, length: int) -> str:
    """Return a text of ``length`` numbers."""
    return " ".join(str((seed * 7 + place * (seed + 1)) % 50) for place in range(length))
