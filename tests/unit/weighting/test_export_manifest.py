"""An exported weighter that is not as it was exported is refused; layers are never made up."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForSequenceClassification

from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.data.hf_tokenizers import save_hf_tokenizer, vocabulary_fingerprint
from megatron_dwm.data.tokenizers import build_tokenizer
from megatron_dwm.errors import UserError
from megatron_dwm.weighting.export import export_weighter
from megatron_dwm.weighting.export_manifest import MANIFEST, read_manifest, verify_export
from megatron_dwm.weighting.weighter_folder import SampleTokens, read_weighter_folder

SETTINGS = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=30)
TOKENIZER = build_tokenizer(SETTINGS)
FINGERPRINT = vocabulary_fingerprint(TOKENIZER, SETTINGS)


def load(folder: Path) -> LlamaForSequenceClassification:
    return read_weighter_folder("--dwm-load", str(folder), SampleTokens(8, 31, 30, FINGERPRINT, str), seed=1).model


def make_export(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=1
    )
    model = LlamaForSequenceClassification(config)
    export_weighter(model, partial(save_hf_tokenizer, TOKENIZER, SETTINGS), folder / "export", {"iteration": 7})
    return folder / "export"


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return make_export(tmp_path)


def rewrite_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop("manifest_sha256")  # an earlier version's
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_whole_export_loads_with_its_own_weights(export: Path):
    assert verify_export("--dwm-load", export)
    manifest = json.loads((export / MANIFEST).read_text())
    assert manifest["iteration"] == 7 and set(manifest["files"]) == {path.name for path in export.iterdir()} - {
        MANIFEST,
        "README.md",  # which may be edited
    }
    weights = load_file(export / "model.safetensors")
    found = load(export).state_dict()
    assert len(weights) > 5 and all(torch.equal(found[key], value) for key, value in weights.items())


def test_single_bits_in_any_file_are_found(export: Path):
    generator = random.Random(4)
    for path in sorted(path for path in export.iterdir() if path.name not in (MANIFEST, "README.md")):
        whole = path.read_bytes()
        content = bytearray(whole)
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"--dwm-load {export}: {path.name} has another sha256"):
            load(export)
        path.write_bytes(whole)


def test_a_fact_that_was_changed_in_the_manifest_is_found(export: Path):
    text = (export / MANIFEST).read_text()
    assert read_manifest(export)["iteration"] == 7
    for changed in (text.replace('"iteration": 7', '"iteration": 3'), text.replace('"iteration"', '"iteratioo"')):
        (export / MANIFEST).write_text(changed)
        with pytest.raises(UserError, match=f"{MANIFEST} cannot be read .changed since it was written"):
            load(export)


INFINITE = '{"files": {"a": {"bytes": 1e999, "sha256": ""}}}'


LENGTHS = [json.dumps({"language_model": model}) for model in ([], *({"seq_length": n} for n in ("x", -8, 1.5, [])))]


@pytest.mark.parametrize(
    "text", ["", "garbage", "[]", '{"files": 3}', '{"files": {"a": 1}}', INFINITE, "[" * 100_000, *LENGTHS]
)
def test_a_damaged_manifest_is_refused(text: str, export: Path):
    (export / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=f"--dwm-load {export}: {MANIFEST} cannot be read"):
        load(export)


def without_a_tensor(export: Path, key: str) -> None:
    weights = load_file(export / "model.safetensors")
    del weights[key]
    save_file(weights, export / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("key", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "score.weight"])
def test_an_export_of_an_earlier_version_lacks_nothing(key: str, export: Path):
    """Its manifest has no checksums, so that the weights themselves are looked at."""
    rewrite_manifest(export, lambda manifest: manifest.pop("files"))
    load(export)
    without_a_tensor(export, key)
    with pytest.raises(UserError, match=f"--dwm-load {export}: its weights lack {key}; give a whole model"):
        load(export)


def test_weights_that_are_not_finite_are_refused(export: Path):
    rewrite_manifest(export, lambda manifest: manifest.pop("files"))
    weights = load_file(export / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, export / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its weights are not finite"):
        load(export)


@pytest.mark.parametrize("content", [b"", b"garbage that is longer than a header", b"\xff" * 64])
def test_damaged_weights_of_a_model_without_manifest_are_one_line(content: bytes, export: Path):
    (export / MANIFEST).unlink()
    (export / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=f"--dwm-load {export}: cannot be loaded") as error:
        load(export)
    assert "\n" not in str(error.value)


def test_a_language_model_lacks_only_the_head_which_gets_zeros(tmp_path: Path):
    config = GPT2Config(vocab_size=31, n_embd=8, n_layer=1, n_head=1, n_positions=8)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    save_hf_tokenizer(TOKENIZER, SETTINGS, tmp_path)
    assert not verify_export("--dwm-init-from", tmp_path)
    assert torch.count_nonzero(load(tmp_path).score.weight) == 0
    without_a_tensor(tmp_path, "transformer.h.0.mlp.c_fc.weight")
    with pytest.raises(UserError, match=r"its weights lack transformer\.h\.0\.mlp\.c_fc\.weight"):
        load(tmp_path)
