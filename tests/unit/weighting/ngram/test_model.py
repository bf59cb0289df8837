"""The n-gram weighter as a transformers model: exported, loaded, and scored with numpy alone."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
)

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.weighting.weighter import Weighter, model_digest
from megatron_dwm.weighting.weighter_init import random_weighter_model, weighter_model_from_json
from tests.e2e.test_docs_commands import block
from tests.programs import Fork

VOCAB_SIZE, EOD = 1000, 999


def weighter_model(**settings: Any) -> Any:
    """A weighter whose parameters are not at their start."""
    config = WeightingConfig(dwm_mode="off", dwm_arch="ngram", dwm_ngram_buckets=512, **settings)
    model = random_weighter_model(config, VOCAB_SIZE, 12, EOD, seed=1)
    torch.manual_seed(2)
    for param in model.parameters():
        torch.nn.init.normal_(param)
    if model.calibration is not None:
        model.calibration.fit(torch.randn(200).double(), torch.randn(200).double())
    return model.eval()


def tokens(samples: int = 5, length: int = 30) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (samples, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("hidden", [0, 8])
def test_it_starts_with_equal_scores(hidden: int):
    config = WeightingConfig(dwm_mode="off", dwm_arch="ngram", dwm_ngram_hidden_size=hidden)
    model = random_weighter_model(config, VOCAB_SIZE, 12, EOD, seed=1)
    assert not model(tokens()).logits.any()
    again = random_weighter_model(config, VOCAB_SIZE, 12, EOD, seed=1)
    assert model_digest(model) == model_digest(again)


@pytest.mark.parametrize("hidden", [0, 8])
def test_scores_do_not_depend_on_batching_or_padding(hidden: int):
    model, batch = weighter_model(dwm_ngram_hidden_size=hidden), tokens()
    expected = model(batch).logits
    assert expected.std() > 0.1
    alone = torch.cat([model(sample[None]).logits for sample in batch])
    padded = torch.nn.functional.pad(batch, (2, 7), value=EOD)
    mask = torch.nn.functional.pad(torch.ones_like(batch), (2, 7))
    for found in (alone, model(padded, attention_mask=mask).logits):
        assert torch.allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("hidden", [0, 8])
def test_an_export_loads_through_the_auto_classes(hidden: int, tmp_path: Path):
    model = weighter_model(dwm_ngram_hidden_size=hidden, dwm_ngram_lengths=[1, 3])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model_digest(loaded) == model_digest(model) and loaded.config.num_labels == 1
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    from_json = weighter_model_from_json(model.config.to_json_string(use_diff=False))
    from_json.load_state_dict(model.state_dict())
    assert torch.equal(from_json(tokens()).logits, model(tokens()).logits)


def test_the_documented_function_scores_an_export_with_numpy_alone(tmp_path: Path):
    model = weighter_model(dwm_ngram_lengths=[1, 2, 3])
    model.save_pretrained(tmp_path)
    program = block("docs/transfer.md: With numpy alone: python")
    assert "torch" not in program and len(program.partition("def score")[2].splitlines()) <= 20
    namespace: dict[str, Any] = {}
    exec(program, namespace)
    for length in (tokens().shape[1], 2, 1, 0):  # a sample may be shorter than the n-grams
        samples = tokens()[:, :length]
        found = [namespace["score"](tmp_path, sample.tolist()) for sample in samples]
        assert found == pytest.approx(model(samples).logits.squeeze(1).tolist(), abs=1e-6), length


def test_it_is_registered_when_transformers_was_imported_first():
    """In a fork that has transformers, and in which this package was never imported."""

    def import_late() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "megatron_dwm"]:
            del sys.modules[name]
        sys.meta_path[:] = [finder for finder in sys.meta_path if "megatron_dwm" not in type(finder).__module__]
        for known in (CONFIG_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING):
            known._extra_content.clear()
        with pytest.raises(ValueError, match="Unrecognized model identifier: dwm_ngram"):
            AutoConfig.for_model("dwm_ngram")
        importlib.import_module("megatron_dwm")
        config = AutoConfig.for_model("dwm_ngram", ngram_buckets=8)
        print(type(AutoModelForSequenceClassification.from_config(config)).__name__)

    done = Fork(import_late).finish()
    assert done.stdout == "NgramForSequenceClassification\n", done.stderr
    assert AutoConfig.for_model("dwm_ngram").ngram_lengths == [1, 2]  # here megatron_dwm was imported first


def test_a_batch_is_scored_in_few_parts_unless_a_size_is_given():
    def parts(model: Any, size: int | None, batch: torch.Tensor) -> list[int]:
        seen: list[int] = []
        config = WeightingConfig(dwm_mode="off", dwm_score_batch_size=size)
        weighter = Weighter(model, config, torch.device("cpu"))
        hook = model.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        scores.append(weighter.score(batch))
        hook.remove()
        return seen

    scores: list[torch.Tensor] = []
    ngrams, batch = weighter_model(), tokens(samples=100)
    assert parts(ngrams, None, batch) == [100] and parts(ngrams, 40, batch) == [40, 40, 20]
    assert torch.equal(*scores)
    assert parts(ngrams, None, tokens(samples=100, length=20_000)) == [52, 48]  # 2^20 tokens at most
    transformer = random_weighter_model(WeightingConfig(dwm_mode="off", dwm_arch="llama"), VOCAB_SIZE, 30, EOD, seed=1)
    assert parts(transformer, None, batch) == [32, 32, 32, 4]


@pytest.mark.parametrize(
    ("vocab_size", "expected"),
    [(400, 131_072), (8192, 131_072), (8193, 262_144), (32_000, 524_288), (128_256, 2_097_152)],
)
def test_the_number_of_buckets_follows_the_vocabulary(vocab_size: int, expected: int):
    for given, buckets in ((None, expected), (4096, 4096)):
        config = WeightingConfig(dwm_mode="off", dwm_arch="ngram", dwm_ngram_buckets=given)
        model = random_weighter_model(config, vocab_size, 12, EOD, seed=1)
        assert len(model.embedding.weight) == model.config.ngram_buckets == buckets


def test_operations_are_counted_for_each_ngram():
    config = WeightingConfig(dwm_mode="off")
    assert Weighter(weighter_model(), config, torch.device("cpu")).num_active_parameters == 2
    hidden = Weighter(weighter_model(dwm_ngram_hidden_size=8), config, torch.device("cpu"))
    assert hidden.num_active_parameters == 2 * 8 + (8 + 8) + (8 * 8 + 8) + 8
