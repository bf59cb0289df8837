"""Indexed datasets of numbers for runs with the NullTokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path

from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.corpora.preprocess import PreprocessConfig, preprocess

VOCAB_SIZE = 100
TOKENIZER = {"--tokenizer-type": "NullTokenizer", "--vocab-size": VOCAB_SIZE}


def make_dataset(folder: Path, name: str, documents: list[list[int]], vocab_size: int = VOCAB_SIZE) -> str:
    """Write ``documents`` of token ids as an indexed dataset; return its prefix."""
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": " ".join(map(str, ids))}) + "\n" for ids in documents))
    tokenizer = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=vocab_size)
    preprocess(PreprocessConfig(input=[str(source)], output_prefix=str(folder / name)), tokenizer)
    return str(folder / f"{name}_text_document")


def counting(seed: int, documents: int = 40, length: int = 50, step: int = 1) -> list[list[int]]:
    """Return documents that count upwards by ``step`` from a random start: easy to learn."""
    generator = random.Random(seed)
    starts = [generator.randrange(VOCAB_SIZE) for _ in range(documents)]
    # All documents differ in length, so that two of them are the same only if they come from the same seed.
    return [[(start + step * i) % VOCAB_SIZE for i in range(length + n)] for n, start in enumerate(starts)]


def noise(seed: int, documents: int = 40, length: int = 50) -> list[list[int]]:
    """Return documents of random tokens: nothing to learn."""
    generator = random.Random(seed)
    return [[generator.randrange(VOCAB_SIZE) for _ in range(length)] for _ in range(documents)]
