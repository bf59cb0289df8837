"""Merged datasets are those of the texts one behind the other, and what cannot be merged is one line."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from megatron_dwm.cli import merge_datasets
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.corpora.preprocess import PreprocessConfig, preprocess
from tests.programs import call_main

TEXTS = {"a": ["1 2 3", "4"], "b.c": ["13", "5 6"], "d": ["7 8 9 10", "11", "12"]}


def make(folder: Path, name: str, texts: list[str], vocab_size: int = 100) -> None:
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=vocab_size)
    preprocess(PreprocessConfig(input=[str(source)], output_prefix=str(folder / name)), tokenizer)
    source.unlink()


run = partial(call_main, merge_datasets.main)


def test_the_bytes_are_those_of_all_texts_in_the_order_of_the_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    for folder in (parts, whole):
        folder.mkdir()
    for name in ("d", "a", "b.c"):
        make(parts, name, TEXTS[name])
    (parts / "notes.txt").write_text("of no dataset")
    make(whole, "all", [text for texts in TEXTS.values() for text in texts])
    assert run("--input", parts, "--output-prefix", tmp_path / "merged") == 0
    assert "merged: 7 documents, 13 tokens of 3 datasets" in capsys.readouterr().out
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"merged{suffix}").read_bytes() == (whole / f"all_text_document{suffix}").read_bytes()


def test_what_cannot_be_merged_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    good, mixed, half, damaged, empty = (tmp_path / name for name in ("good", "mixed", "half", "damaged", "empty"))
    for folder in (good, mixed, empty):
        folder.mkdir()
    make(good, "a", TEXTS["a"])
    make(mixed, "a", TEXTS["a"])
    make(mixed, "b", TEXTS["d"], vocab_size=70_000)
    for folder in (half, damaged):
        shutil.copytree(good, folder)
    (half / "a_text_document.idx").unlink()
    (damaged / "a_text_document.bin").write_bytes(b"\x00")
    for words, expected in [
        (["--input", tmp_path / "none"], "no such folder"),
        (["--input", empty], "holds no datasets"),
        (["--input", half], "a_text_document.idx is missing"),
        (["--input", damaged], "has 1 bytes where its index says 8"),
        (["--input", mixed], "its tokens are int32, those of"),
        (["--input", good, "--multimodal"], "only text is trained on here"),
        (["--input", good, "--output-prefix", good / "a_text_document"], "is one of the datasets"),
    ]:
        assert run(*(["--output-prefix", tmp_path / "out"] if len(words) < 4 else []), *words) == 2, expected
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and expected in message, message
    assert not list(tmp_path.glob("out*"))
