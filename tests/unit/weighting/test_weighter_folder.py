"""Any classifier with one output reads a run's samples: by their text, in windows, or beyond the length it has seen."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLNetConfig,
)

from megatron_dwm.analysis.scoring_model import ScoringModel
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.data.hf_tokenizers import save_hf_tokenizer, vocabulary_fingerprint
from megatron_dwm.data.sample_text import sample_text
from megatron_dwm.data.tokenizers import build_tokenizer
from megatron_dwm.errors import UserError
from megatron_dwm.weighting.sample_reader import TextReader
from megatron_dwm.weighting.weighter import Weighter
from megatron_dwm.weighting.weighter_folder import SampleTokens, WeighterFolder, read_weighter_folder
from megatron_dwm.weighting.windows import position_limit

SETTINGS = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=30)
TOKENIZER = build_tokenizer(SETTINGS)
SAMPLES = SampleTokens(
    24,
    TOKENIZER.vocab_size,
    TOKENIZER.eod,
    vocabulary_fingerprint(TOKENIZER, SETTINGS),
    partial(sample_text, tokenizer=TOKENIZER, separator="\n\n"),
)
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 1}
LLAMA = LlamaConfig(**SMALL, vocab_size=31, pad_token_id=30, max_position_embeddings=8)


def classifier(config: Any) -> Any:
    """A classifier whose scores differ from sample to sample."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.5)
    return model


def tokens(seed: int = 1, samples: int = 5) -> torch.Tensor:
    """Samples of 24 tokens with the end of a document in each."""
    found = torch.randint(0, 30, (samples, 24), generator=torch.Generator().manual_seed(seed))
    found[:, 9] = TOKENIZER.eod
    return found


def other_tokenizer(folder: Path, ids: dict[str, int], *, special: bool) -> None:
    """Write a tokenizer of numbers as words with other ids than the run's."""
    words = Tokenizer(models.WordLevel(ids, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
        )
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(folder)


def read(folder: Path) -> WeighterFolder:
    return read_weighter_folder("--dwm-load", str(folder), SAMPLES, seed=1)


def weighter(found: WeighterFolder) -> Weighter:
    return Weighter(found.model, WeightingConfig(dwm_score_batch_size=3), torch.device("cpu"), reader=found.reader)


def test_a_classifier_with_its_separate_tokenizer_reads_the_text_of_a_sample(tmp_path: Path):
    """FineWeb-Edu's shape: a BERT with special tokens, whose 12 positions hold 10 tokens of a text."""
    ids = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, **{str(number): 40 - number for number in range(30)}}
    config = BertConfig(**SMALL, vocab_size=41, max_position_embeddings=12, pad_token_id=0)
    model = classifier(config)
    model.save_pretrained(tmp_path)
    other_tokenizer(tmp_path, ids, special=True)
    found = read(tmp_path)
    assert found.separate_tokenizer is not None and "in windows of 12 tokens" in found.reading
    scores = weighter(found).score(tokens())
    expected = []
    for sample in tokens().tolist():
        words = [ids[str(number)] for number in sample if number != TOKENIZER.eod]
        parts = [words[start : start + 10] for start in range(0, len(words), 10)]
        each = [float(model(input_ids=torch.tensor([[1, *part, 2]])).logits.detach()) * len(part) for part in parts]
        expected.append(sum(each) / len(words))
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert scores.std() > 5e-4
    text = [" ".join(str(number) for number in sample if number != TOKENIZER.eod) for sample in tokens().tolist()]
    scorer = ScoringModel(str(tmp_path), None, 100, torch.device("cpu"))
    assert scorer.score(scorer.tokenize(text), "mean") == pytest.approx(expected, abs=1e-5)


def test_the_digest_that_ranks_compare_covers_configuration_and_tokenizer(tmp_path: Path):
    """Folders that differ between nodes may have equal weights and an equal vocabulary."""
    ids = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, **{str(number): 40 - number for number in range(30)}}
    classifier(BertConfig(**SMALL, vocab_size=41, max_position_embeddings=12, pad_token_id=0)).save_pretrained(tmp_path)
    other_tokenizer(tmp_path, ids, special=True)
    found = read(tmp_path)
    assert weighter(found).score(tokens()).isfinite().all() and read(tmp_path).digest == found.digest
    for name, key, value in (("config.json", "hidden_act", "relu"), ("tokenizer.json", "post_processor", None)):
        content = (tmp_path / name).read_text()
        (tmp_path / name).write_text(json.dumps({**json.loads(content), key: value}))
        other = read(tmp_path)
        assert other.digest != found.digest and other.fingerprint == found.fingerprint
        assert (other.tokenizer_digest == found.tokenizer_digest) == (name == "config.json")
        (tmp_path / name).write_text(content)


def test_loading_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Every rank loads it, and the log is no place for transformers' progress bars."""
    classifier(LLAMA).save_pretrained(tmp_path)
    save_hf_tokenizer(TOKENIZER, SETTINGS, tmp_path)
    capfd.readouterr()
    assert read(tmp_path).digest
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_without_their_scales_are_refused(dtype: torch.dtype, tmp_path: Path):
    model = classifier(LLAMA)
    model.save_pretrained(tmp_path)
    save_hf_tokenizer(TOKENIZER, SETTINGS, tmp_path)
    assert read(tmp_path).digest
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(dtype)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} has type torch\.\w+; give a model that is not quantized"):
        read(tmp_path)


def test_other_ids_for_the_same_words_give_the_same_scores_and_the_same_steps(tmp_path: Path):
    model = classifier(LLAMA)
    permuted = torch.randperm(31, generator=torch.Generator().manual_seed(1))
    other = classifier(LLAMA)
    with torch.no_grad():
        other.model.embed_tokens.weight[permuted] = model.model.embed_tokens.weight
    other.config.pad_token_id = int(permuted[30])
    other.save_pretrained(tmp_path)
    ids = {str(number): int(permuted[number]) for number in range(30)} | {"[PAD]": int(permuted[30])}
    other_tokenizer(tmp_path, ids, special=False)
    plain = Weighter(model, WeightingConfig(), torch.device("cpu"))
    by_text = weighter(read(tmp_path))
    samples = tokens()
    samples[:, 9] = 7  # an end of document would be a token to one of them alone
    assert by_text.score(samples).tolist() == pytest.approx(plain.score(samples).tolist(), abs=1e-5)
    for one in (plain, by_text):
        one._score(samples).backward(torch.arange(5.0))
    gradients = [one.model.score.weight.grad for one in (plain, by_text)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_a_text_is_tokenized_once_while_it_is_kept(tmp_path: Path):
    model = classifier(LLAMA)
    model.save_pretrained(tmp_path)
    other_tokenizer(tmp_path, {str(n): n for n in range(30)} | {"[PAD]": 30}, special=False)
    texts: list[str] = []

    def text_of(sample: Any) -> str:
        texts.append(SAMPLES.text_of(sample))
        return texts[-1]

    reader = TextReader(text_of, PreTrainedTokenizerFast.from_pretrained(tmp_path), None, max_cached_tokens=23 * 6)
    first = reader(tokens(1))
    assert reader(tokens(1)) == first and len(texts) == 5
    assert reader(torch.cat([tokens(1), tokens(1)])) == first * 2 and len(texts) == 5
    reader(tokens(2))
    assert reader(tokens(1)[1:4]) == first[1:4] and len(texts) == 13  # one of six was kept
    (window,) = reader(torch.full((1, 24), TOKENIZER.eod))[0]
    assert list(window.ids) == [] and window.size == 1
    by_text = Weighter(model, WeightingConfig(), torch.device("cpu"), reader=reader)
    assert by_text.score(torch.full((1, 24), TOKENIZER.eod)).isfinite().all()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_longer_samples_are_scored_whole_where_positions_go_on_and_else_in_windows(kind: str, tmp_path: Path):
    config = LLAMA
    if kind == "gpt2":
        config = GPT2Config(vocab_size=31, n_embd=8, n_layer=1, n_head=2, n_positions=10, num_labels=1, pad_token_id=30)
    model = classifier(config)
    model.save_pretrained(tmp_path)
    save_hf_tokenizer(TOKENIZER, SETTINGS, tmp_path)
    found = read(tmp_path)
    samples = tokens()
    parts = samples.split(10, dim=1) if kind == "gpt2" else [samples]
    expected = sum(model(input_ids=part).logits.squeeze(-1) * part.shape[1] for part in parts) / 24
    if kind == "gpt2":
        assert found.reading.startswith("its maximum length is 10: samples of 24 tokens are scored in windows of 10")
    else:
        assert found.reading.startswith("made for 8 tokens; samples of 24 tokens are scored whole")
    assert weighter(found).score(samples).tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    window = None if kind == "gpt2" else 24
    scorer = ScoringModel(str(tmp_path), window, 50, torch.device("cpu"))
    assert scorer.score(samples.tolist(), "mean") == pytest.approx(expected.tolist(), abs=1e-5)
    if kind == "gpt2":
        with pytest.raises(UserError, match="--window 11: the model's positions end at 10"):
            ScoringModel(str(tmp_path), 11, 50, torch.device("cpu"))


def test_positions_that_change_with_the_length_of_a_batch_are_limited(tmp_path: Path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config = LlamaConfig(**SMALL, vocab_size=31, max_position_embeddings=8, pad_token_id=30, rope_parameters=rope)
    model = classifier(config)
    model.save_pretrained(tmp_path)
    save_hf_tokenizer(TOKENIZER, SETTINGS, tmp_path)
    samples, found = tokens(), read(tmp_path)
    assert found.reading.startswith("its maximum length is 8: samples of 24 tokens are scored in windows of 8")
    parts = [model(input_ids=part).logits.squeeze(-1) for part in samples.split(8, dim=1)]
    expected = (sum(parts) / len(parts)).tolist()
    assert weighter(found).score(samples).tolist() == pytest.approx(expected, abs=1e-5)
    assert ScoringModel(str(tmp_path), None, 500, torch.device("cpu")).score(samples.tolist(), "mean") == (
        pytest.approx(expected, abs=1e-5)
    )
    assert position_limit(classifier(XLNetConfig(vocab_size=31, d_model=8, n_layer=1, n_head=2, d_inner=8))) is None


def test_the_positions_of_roberta_begin_behind_that_of_padding():
    model = classifier(RobertaConfig(**SMALL, vocab_size=31, max_position_embeddings=14, pad_token_id=1))
    limit = position_limit(model)
    assert limit == 12
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5))
