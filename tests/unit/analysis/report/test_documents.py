"""Weights of samples by exported weighters: those of training, relative to the reference samples."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from megatron_dwm.analysis.report.documents import exports, weights_over_time
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.data.hf_tokenizers import save_hf_tokenizer, vocabulary_fingerprint
from megatron_dwm.data.sample_text import sample_text
from megatron_dwm.data.tokenizers import build_tokenizer
from megatron_dwm.weighting.export_manifest import write_manifest
from megatron_dwm.weighting.weighter import Weighter
from megatron_dwm.weighting.weighter_folder import SampleTokens
from megatron_dwm.weighting.weights import weights_from_scores

SIZES = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEMPERATURE = 0.5
SETTINGS = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=19)
TOKENIZER = build_tokenizer(SETTINGS)
SAMPLES = SampleTokens(
    8,
    TOKENIZER.vocab_size,
    TOKENIZER.eod,
    vocabulary_fingerprint(TOKENIZER, SETTINGS),
    partial(sample_text, tokenizer=TOKENIZER, separator=" "),
)


def test_weights_are_those_of_training_with_the_reference_as_the_batch(tmp_path: Path):
    torch.manual_seed(5)
    tokens = torch.randint(20, (6, 8))
    expected = []
    for iteration in (10, 20):
        model = LlamaForSequenceClassification(
            LlamaConfig(**SIZES, num_labels=1, pad_token_id=0, initializer_range=1.0)
        )
        folder = tmp_path / "weighter" / f"iter_{iteration:07d}"
        model.save_pretrained(folder)
        save_hf_tokenizer(TOKENIZER, SETTINGS, folder)
        write_manifest(folder, {"iteration": iteration, "temperature": TEMPERATURE})
        scores = Weighter(model, WeightingConfig(dwm_mode="off"), torch.device("cpu")).score(tokens)
        in_batch = weights_from_scores(scores[2:], TEMPERATURE)
        others = torch.exp((scores[:2, None] - scores[2:]).double() / TEMPERATURE) * in_batch
        expected.append(torch.cat([others.mean(1), in_batch]))
    (tmp_path / "weighter" / "iter_0000030").mkdir()  # being written: without its manifest
    folders = exports(tmp_path)
    iterations, weights = weights_over_time(folders, tokens, 4, SAMPLES)
    assert iterations == [10, 20] and weights.shape == (6, 2)
    assert torch.from_numpy(weights).T.flatten().tolist() == pytest.approx(torch.cat(expected).tolist(), rel=1e-5)
    assert weights[2:].mean(0) == pytest.approx([1.0, 1.0]) and weights.std() > 0.1


def test_a_weighter_with_another_tokenizer_and_a_short_context_reads_the_texts(tmp_path: Path):
    """It would take the run's tokens for its own words, and has no positions for all of them."""
    words = {str(number): 21 - number for number in range(20)} | {"[PAD]": 22}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = torch.randint(19, (6, 8), generator=torch.Generator().manual_seed(5))
    for iteration in (10, 20):
        torch.manual_seed(iteration)
        sizes = {**SIZES, "vocab_size": 23, "max_position_embeddings": 4, "initializer_range": 1.0}
        model = BertForSequenceClassification(BertConfig(**sizes, num_labels=1, pad_token_id=22))
        folder = tmp_path / "weighter" / f"iter_{iteration:07d}"
        model.save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
        write_manifest(folder, {"iteration": iteration, "temperature": TEMPERATURE})
    _, weights = weights_over_time(exports(tmp_path), tokens, 4, SAMPLES)
    texts = torch.tensor([[words[str(token)] for token in sample] for sample in tokens.tolist()])
    with torch.no_grad():
        halves = [model.eval()(input_ids=part).logits[:, 0].double() for part in texts.split(4, dim=1)]
    scores = sum(halves) / 2 / TEMPERATURE
    expected = 4 * torch.exp(scores - torch.logsumexp(scores[-4:], 0))
    assert weights[:, -1].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
