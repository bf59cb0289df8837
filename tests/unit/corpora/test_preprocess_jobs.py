"""Preprocessing in tasks of a cluster: the datasets are byte for byte those of one process."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_dwm.config.slurm import SlurmConfig
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.corpora.preprocess import PreprocessConfig, preprocess
from megatron_dwm.corpora.preprocess_jobs import submit_preprocess
from megatron_dwm.errors import UserError

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
    prefixes, number = submit_preprocess(
        PreprocessConfig(**settings, output_prefix=str(tmp_path / "many")), TOKENIZER, HERE
    )
    assert number is None and prefixes == [f"{tmp_path}/many_{key}_document" for key in keys]
    for key in keys:
        for suffix in (".bin", ".idx"):
            one, many = (tmp_path / f"{name}_{key}_document{suffix}" for name in ("one", "many"))
            assert many.read_bytes() == one.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_done_in_tasks_is_one_line(tmp_path: Path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "1"}\n{\n')
    usual = {"input": [str(source)], "output_prefix": str(tmp_path / "out"), "workers": 2}
    for wrong, message in [
        ({"output_per_file": True}, "--output-per-file is not possible with --slurm-partition"),
        ({"partitions": 2}, "--partitions 2 is not possible with --slurm-partition"),
        ({}, "a.jsonl, line 2: not JSON"),
        ({"json_keys": ["title"], "skip_malformed": True}, "no documents"),
    ]:
        with pytest.raises(UserError, match=message):
            submit_preprocess(PreprocessConfig(**usual, **wrong), TOKENIZER, HERE)
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
