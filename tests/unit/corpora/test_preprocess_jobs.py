"""Preprocessing in tasks of a cluster: the datasets are byte for byte those of one process."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from megatron_dwm.cli import preprocess as cli
from megatron_dwm.config.slurm import SlurmConfig
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.corpora.preprocess import PreprocessConfig, preprocess
from megatron_dwm.corpora.preprocess_jobs import preprocess_in_tasks
from megatron_dwm.errors import UserError
from tests.e2e.test_docs_commands import block

TOKENIZER = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=100)
HERE = SlurmConfig()


def test_tasks_make_the_datasets_of_one_process(tmp_path: Path):
    """Empty documents, a task without documents, malformed lines and several files among them."""
    keys = ["text", "title"]
    lines = [json.dumps({"text": f"{n} {n + 1}" if n % 5 else "", "title": "7"}) + "\n" for n in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(lines[:30]) + "{\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[30:]).encode()))
    (tmp_path / "c.jsonl").write_text("{\n")
    settings = {"input": [str(tmp_path / name) for name in ("a.jsonl", "c.jsonl", "b.jsonl.gz")], "json_keys": keys}
    settings |= {"append_eod": True, "skip_malformed": True, "split_bytes": 200}
    preprocess(PreprocessConfig(**settings, output_prefix=str(tmp_path / "one")), TOKENIZER)
    (tmp_path / "many_text_document.idx").write_bytes(b"an old one")
    prefixes, number = preprocess_in_tasks(
        PreprocessConfig(**settings, output_prefix=str(tmp_path / "many")), TOKENIZER, HERE
    )
    assert number is None and prefixes == [f"{tmp_path}/many_{key}_document" for key in keys]
    for key in keys:
        for suffix in (".bin", ".idx"):
            one, many = (tmp_path / f"{name}_{key}_document{suffix}" for name in ("one", "many"))
            assert many.read_bytes() == one.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_the_command_makes_the_same_dataset_with_either_executor(tmp_path: Path, capsys):
    """Two processes, and folders with files of one name; what is skipped is said."""
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        lines = [json.dumps({"text": f"{number} {len(folder)}"}) for number in range(20)]
        (tmp_path / folder / "a.jsonl").write_text("\n".join([*lines, "{"]) + "\n")
    tokenizer = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100", "--skip-malformed"]
    command = ["--input", str(tmp_path / "x"), str(tmp_path / "y"), "--workers", "2", *tokenizer]
    for executor in ("pool", "datatrove"):
        cli.main([*command, "--output-prefix", str(tmp_path / executor), "--executor", executor])
        out, err = capsys.readouterr()
        assert out == f"{tmp_path}/{executor}_text_document: 40 documents, 80 tokens\n"
        said = re.findall(r"(\d) malformed documents were skipped, the first: .*/(.)/a.jsonl, line 21: not JSON", err)
        assert said == ([("2", "x")] if executor == "pool" else [("1", "x"), ("1", "y")])
    for suffix in (".bin", ".idx"):
        pool, datatrove = (tmp_path / f"{name}_text_document{suffix}" for name in ("pool", "datatrove"))
        assert datatrove.read_bytes() == pool.read_bytes()


def test_shards_of_the_documented_pipeline_are_merged_to_the_dataset_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As the page prints it, but for the tokenizer and the number of processes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    for name, numbers in (("b.jsonl", range(9)), ("a.jsonl", range(9, 30)), ("empty.jsonl", ())):
        (tmp_path / "corpus" / name).write_text("".join(json.dumps({"text": f"{n} {n}"}) + "\n" for n in numbers))
    preprocess(PreprocessConfig(input=["corpus"], output_prefix="one", append_eod=True), TOKENIZER)
    program = block("docs/own-data.md: At corpus size: python").replace("workers=4", "workers=1")
    printed = 'TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model="tokenizer.model")'
    assert printed in program
    exec(program.replace(printed, 'TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=100)'), {})
    for suffix in (".bin", ".idx"):
        one, merged = (tmp_path / f"{name}_text_document{suffix}" for name in ("one", "corpus"))
        assert merged.read_bytes() == one.read_bytes()


def test_what_cannot_be_done_in_tasks_is_one_line(tmp_path: Path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "1"}\n{\n')
    usual = {"input": [str(source)], "output_prefix": str(tmp_path / "out"), "workers": 2}
    for wrong, message in [
        ({"output_per_file": True}, "--output-per-file is not possible with --executor datatrove"),
        ({"partitions": 2}, "--partitions 2 is not possible with --executor datatrove"),
        ({}, "a.jsonl, line 2: not JSON"),
        ({"json_keys": ["title"], "skip_malformed": True}, "no documents"),
    ]:
        with pytest.raises(UserError, match=message):
            preprocess_in_tasks(PreprocessConfig(**usual, **wrong), TOKENIZER, HERE)
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
