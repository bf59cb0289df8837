"""What ranks compare before they train."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from megatron_dwm.cli.rank_agreement import rank_facts, tokenizer_files
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.corpora.preprocess import tokenizer_stamp
from megatron_dwm.data.blend import data_paths
from tests.small_runs import GPT, IN_PROCESS, parse_flags


def test_weights_that_a_file_gives_are_compared(tmp_path: Path):
    """The flag is the same on every node, its file need not be."""
    listed = tmp_path / "blend.txt"
    flags = {name: value for name, value in IN_PROCESS.items() if name != "--mock-data"}
    config = parse_flags({**GPT, **flags, "--dwm-mode": "off", "--data-args-path": listed})
    found = []
    for text in ("1 a 2 b", "1 a 3 b"):
        listed.write_text(text)
        found.append(rank_facts(config, data_paths(config.data, None), None))
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"blend of --data-path"}


def test_switches_are_compared_by_the_names_that_a_user_gives():
    """The field of one that turns something off has a name that is no flag."""
    flags = {**GPT, **IN_PROCESS, "--dwm-mode": "off"}
    config = parse_flags(flags)
    paths = data_paths(config.data, None)
    for switch in ("--no-check-for-nan-in-loss-and-grad", "--no-bias-dropout-fusion", "--fp16"):
        one, other = rank_facts(config, paths, None), rank_facts(parse_flags({**flags, switch: True}), paths, None)
        assert (one[switch], other[switch]) == ("not given", "given")


def test_a_tokenizer_is_compared_by_its_files(tmp_path: Path):
    for name in ("tokenizer.json", "merges.txt", "sp.model", "model.safetensors", "README.md"):
        (tmp_path / name).write_text(name)
    folder = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path))
    assert [path.name for _, path in tokenizer_files(folder)] == ["merges.txt", "sp.model", "tokenizer.json"]
    file = TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path / "sp.model"))
    assert list(tokenizer_files(file)) == [("--tokenizer-model", tmp_path / "sp.model")]


def test_a_tokenizer_of_the_hub_is_compared_by_the_files_of_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    on_the_hub = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="somebody/a-model")
    assert not list(tokenizer_files(on_the_hub)) and tokenizer_stamp(on_the_hub)["files"] == []
    copies = tmp_path / "models--somebody--a-model"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    stamps = []
    for revision in ("1" * 40, "2" * 40):  # another one is copied while a run is interrupted
        (copies / "snapshots" / revision).mkdir(parents=True)
        (copies / "refs").mkdir(exist_ok=True)
        (copies / "refs" / "main").write_text(revision)
        (copies / "snapshots" / revision / "tokenizer.json").write_text(revision)
        ((_, file),) = tokenizer_files(on_the_hub)
        assert file.read_text() == revision
        stamps.append(tokenizer_stamp(on_the_hub))
    assert stamps[0] != stamps[1]
