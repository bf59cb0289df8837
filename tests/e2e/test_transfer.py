"""A weighter leaves one run and serves others: frozen, as a start, and with transformers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3ForSequenceClassification,
)

from megatron_dwm.analysis.scoring_model import ScoringModel
from megatron_dwm.cli import export_weighter
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.data.hf_tokenizers import vocabulary_fingerprint
from megatron_dwm.data.tokenizers import build_tokenizer
from megatron_dwm.errors import UserError
from megatron_dwm.weighting.weighter import Weighter
from megatron_dwm.weighting.weighter_folder import SampleTokens, read_weighter_folder
from tests.e2e.datasets import TOKENIZER, VOCAB_SIZE, counting, make_dataset, noise
from tests.e2e.launch import pretrain, records, succeed
from tests.small_runs import LANGUAGE_MODEL, TRAINING, WEIGHTING

TP2PP2 = {"--tensor-model-parallel-size": 2, "--pipeline-model-parallel-size": 2}


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that learns a weighter on TP2 x PP2, and its flags."""
    folder = tmp_path_factory.mktemp("first")
    flags = {
        **LANGUAGE_MODEL,
        "--qk-layernorm": True,  # a Qwen3, and so is the weighter that is started from it
        **TRAINING,
        **TOKENIZER,
        "--train-data-path": [
            *("0.5", make_dataset(folder, "clean", counting(0))),
            *("0.5", make_dataset(folder, "noise", noise(1))),
        ],
        "--dwm-target-data-path": make_dataset(folder, "target", counting(3)),
    }
    succeed(folder / "log", 4, {**flags, **WEIGHTING, **TP2PP2, "--save": folder / "save"})
    return folder / "save", flags


def test_the_export_says_what_it_is_and_loads_with_transformers_alone(first_run):
    save, _ = first_run
    exports = sorted(path.name for path in (save / "weighter").iterdir())
    assert exports == ["iter_0000006", "iter_0000010"]  # the ends of the two stages
    manifest = json.loads((save / "weighter" / "iter_0000010" / "dwm_manifest.json").read_text())
    assert (manifest["iteration"], manifest["stage"], manifest["mode"]) == (10, 2, "bilevel")
    assert manifest["num_stages"] == 2
    assert manifest["language_model"]["num_layers"] == 2 and manifest["sources"] == ["clean", "noise"]
    model = AutoModelForSequenceClassification.from_pretrained(save / "weighter" / "iter_0000010")
    tokenizer = AutoTokenizer.from_pretrained(save / "weighter" / "iter_0000010")
    assert type(model) is Qwen3ForSequenceClassification and tokenizer.model_max_length == 32
    assert len(tokenizer("5 " * 50, truncation=True).input_ids) == 32
    card = (save / "weighter" / "iter_0000010" / "README.md").read_text()
    assert "what lowers the loss on `" in card and "* Stage: 2 of 2" in card and "Not measured in this folder" in card
    assert model(**tokenizer("5 6 7 8", return_tensors="pt")).logits.shape == (1, 1)


def test_the_weighter_of_any_checkpoint_is_exported(first_run, tmp_path: Path):
    save, _ = first_run
    arguments = {"load": str(save), "output": str(tmp_path / "exported")}
    with pytest.raises(UserError, match="--baseline: a run without evaluations"):
        export_weighter.export(export_weighter.ExportWeighterConfig(**arguments, baseline=str(save)))
    assert not (tmp_path / "exported").exists()
    written = export_weighter.export(export_weighter.ExportWeighterConfig(**arguments))
    assert written.startswith(f"{tmp_path / 'exported'}: wrote a Qwen3ForSequenceClassification of ")
    assert written.endswith("loaded again, its weights and scores are the checkpoint's")
    during = save / "weighter" / "iter_0000010"
    for name in ("model.safetensors", "config.json", "tokenizer_config.json", "dwm_manifest.json"):
        assert (tmp_path / "exported" / name).read_bytes() == (during / name).read_bytes(), name
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "exported").iterdir()} == {0o644}
    card = (tmp_path / "exported" / "README.md").read_text()
    size = records(save / "metrics.jsonl", "train")[-1]["effective_sample_size"]
    assert f"Effective sample size at iteration 10: {size:.2f} of the batch" in card
    assert "Shares that the weights gave" in card
    with pytest.raises(UserError, match="exported exists; remove it or give another folder"):
        export_weighter.ExportWeighterConfig(**arguments)


def test_the_weighter_scores_what_transformers_computes(first_run):
    folder = first_run[0] / "weighter" / "iter_0000010"
    settings = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCAB_SIZE)
    fingerprint = vocabulary_fingerprint(build_tokenizer(settings), settings)
    samples = SampleTokens(32, VOCAB_SIZE + 1, VOCAB_SIZE, fingerprint, str)
    loaded = read_weighter_folder("--dwm-load", str(folder), samples, seed=0).model
    tokens = torch.tensor([ids[:32] for ids in (*counting(0)[:20], *noise(1)[:20])])
    scores = Weighter(loaded, WeightingConfig(), torch.device("cpu")).score(tokens)
    with torch.no_grad():
        expected = AutoModelForSequenceClassification.from_pretrained(folder)(input_ids=tokens).logits.squeeze(-1)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    assert float(scores.std()) > 1e-3
    # The export states its window and that it takes no special tokens, so that scoring is the same without flags.
    scorer = ScoringModel(str(folder), None, 100, torch.device("cpu"))
    assert scorer.window == scorer.tokenizer.model_max_length == 32 and len(scorer.special) == 0
    assert scorer.score(tokens.tolist(), "mean") == pytest.approx(scores.tolist(), abs=1e-5)


def test_a_frozen_weighter_weighs_for_a_larger_model(first_run, tmp_path: Path):
    save, flags = first_run
    changes = {"--dwm-mode": "frozen", "--dwm-load": save / "weighter" / "iter_0000010"}
    changes |= {"--dwm-target-data-path": False, "--hidden-size": 64, "--metrics-jsonl": tmp_path / "metrics.jsonl"}
    succeed(tmp_path / "log", 1, {**flags, **changes})
    steps = records(tmp_path / "metrics.jsonl", "train")
    assert len(steps) == 10 and not records(tmp_path / "metrics.jsonl", "outer_update")
    assert all(step["effective_sample_size"] < 1 for step in steps)


def with_other_ids(folder: Path, copy: Path) -> Path:
    """Copy a weighter; in the copy all words have other ids, and the embedding's rows are where these are."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    rows = torch.arange(VOCAB_SIZE + 1).roll(7)  # the word of row i gets the id rows[i]
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[rows] = embedding.clone()
    model.config.pad_token_id = int(rows[VOCAB_SIZE])
    model.save_pretrained(copy)
    AutoTokenizer.from_pretrained(folder).save_pretrained(copy)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["id"] = int(rows[token["id"]])
    tokenizer["model"]["vocab"] = {word: int(rows[index]) for word, index in tokenizer["model"]["vocab"].items()}
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    return copy


def test_the_frozen_weights_do_not_depend_on_the_layout(first_run, tmp_path: Path):
    save, flags = first_run
    changes = {
        "--dwm-mode": "frozen",
        "--dwm-load": save / "weighter" / "iter_0000010",
        "--dwm-target-data-path": False,
    }
    other_ids = with_other_ids(save / "weighter" / "iter_0000010", tmp_path / "other_ids")
    means = []
    for name, processes, more in (
        ("one", 1, {}),
        ("four", 4, TP2PP2),
        ("two", 2, {}),
        ("text", 2, {"--dwm-load": other_ids}),
    ):
        metrics = tmp_path / f"{name}.jsonl"
        finished = succeed(tmp_path / name, processes, {**flags, **changes, **more, "--metrics-jsonl": metrics})
        means.append([step["weight_by_source"] for step in records(metrics, "train")])
        assert ("texts are rebuilt, tokenized again" in finished.text) == (name == "text")
    # Scores are computed in other batches: fp32 rounding.
    for other in means[1:]:
        for expected, found in zip(means[0], other, strict=True):
            assert found == pytest.approx(expected, rel=1e-5)


def test_each_stage_has_the_weighter_of_its_fraction_of_training(first_run, tmp_path: Path):
    """6 of 10 iterations are the first stage's, so 3 of 5 are here; samples are twice as long. It resumes exactly."""
    save, flags = first_run
    changes = {"--dwm-mode": "frozen", "--dwm-load": save / "weighter", "--dwm-target-data-path": False}
    changes |= {"--train-iters": 5, "--seq-length": 64, "--max-position-embeddings": 64, "--lr-warmup-iters": 1}
    found = {}
    for name, more in (
        ("staged", {"--save": tmp_path / "save", "--save-interval": 2}),
        ("first", {"--dwm-load": save / "weighter/iter_0000006"}),
        ("resumed", {"--load": tmp_path / "save", "--ckpt-step": 2}),
    ):
        metrics = tmp_path / f"{name}.jsonl"
        finished = succeed(tmp_path / name, 1, {**flags, **changes, **more, "--metrics-jsonl": metrics})
        assert "made for 32 tokens; samples of 64 tokens are scored whole" in finished.text
        found[name] = records(metrics, "train")
    assert [step["stage"] for step in found["staged"]] == [1, 1, 1, 2, 2]
    weights = {name: [step["weight_by_source"] for step in steps] for name, steps in found.items()}
    assert weights["staged"][:3] == weights["first"][:3] and weights["staged"][3:] != weights["first"][3:]
    assert weights["resumed"] == weights["staged"][2:]
    manifest = json.loads((tmp_path / "save/weighter/iter_0000004/dwm_manifest.json").read_text())
    assert (manifest["stage"], manifest["train_iters"], manifest["language_model"]["seq_length"]) == (2, 5, 64)


def test_learning_goes_on_from_a_weighter_with_another_tokenizer(first_run, tmp_path: Path):
    """Its exports have its tokenizer, and a resumed run needs its folder."""
    save, flags = first_run
    other_ids = with_other_ids(save / "weighter/iter_0000010", tmp_path / "other_ids")
    changes = {**WEIGHTING, "--dwm-init-from": other_ids, "--save": tmp_path / "save", "--dwm-warmup-iters": 0}
    succeed(tmp_path / "log", 2, {**flags, **changes, "--exit-interval": 6})
    export = tmp_path / "save/weighter/iter_0000006"
    assert AutoTokenizer.from_pretrained(export).get_vocab() == AutoTokenizer.from_pretrained(other_ids).get_vocab()
    learned, start = (AutoModelForSequenceClassification.from_pretrained(path) for path in (export, other_ids))
    assert not torch.equal(learned.score.weight, start.score.weight)
    resumed = {
        **flags,
        **changes,
        "--load": tmp_path / "save",
        "--train-iters": 8,
        "--override-opt_param-scheduler": True,
    }
    finished = pretrain(tmp_path / "log", 1, {**resumed, "--dwm-init-from": "random"})
    assert finished.codes == [2] and "the checkpoint's weighter has another tokenizer" in finished.text
    other_model = tmp_path / "other_model"  # which would read the samples in windows
    config = BertConfig(vocab_size=101, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    config.max_position_embeddings, config.num_labels = 12, 1
    BertForSequenceClassification(config).save_pretrained(other_model)
    AutoTokenizer.from_pretrained(other_ids).save_pretrained(other_model)
    found = []
    for folder in (other_ids, other_model):
        metrics = tmp_path / f"{folder.name}.jsonl"
        again = {"--dwm-init-from": folder, "--metrics-jsonl": metrics, "--save": False}
        succeed(tmp_path / "log", 1, {**resumed, **again})
        found.append([record["samples"] for record in records(metrics, "outer_update")])
    assert found[0] and found[0] == found[1]


@pytest.mark.parametrize("kind", ["an exported weighter", "a language model"])
def test_learning_goes_on_from_a_hugging_face_folder(first_run, kind: str, tmp_path: Path):
    save, flags = first_run
    start = save / "weighter" / "iter_0000010"
    if kind == "a language model":
        config = LlamaConfig(
            vocab_size=101, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
        AutoTokenizer.from_pretrained(start).save_pretrained(tmp_path / "lm")
        start = tmp_path / "lm"
    metrics = tmp_path / "metrics.jsonl"
    changes = {**WEIGHTING, "--dwm-init-from": start, "--metrics-jsonl": metrics}
    succeed(tmp_path / "log", 1, {**flags, **changes})
    updates = records(metrics, "outer_update")
    assert len(updates) == 4
    uniform = set(updates[0]["samples"]["weight"]) == {1.0}
    assert uniform == (kind == "a language model")
