"""What cannot be selected from, or written to, is one line, and nothing is left behind."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dwm.cli import select
from tests.programs import call_main

run = partial(call_main, select.main)

GOOD = b'{"score": 1, "source": "a", "tokens": 3, "text": "w"}\n'


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (GOOD, ["--documents", 2], "asks for 2 documents of all sources, which holds 1"),
        (GOOD, ["--documents", 0], "--documents"),
        (GOOD, ["--fraction", 0.5], "--fraction 0.5: too small for any of 1 documents"),
        (GOOD, ["--fraction", 1.5], "--fraction 1.5 is not between 0 and 1"),
        (GOOD, ["--fraction", "nan"], "--fraction: nan is not a finite number"),
        (GOOD, [], "give one of --documents, --tokens and --fraction"),
        (GOOD, ["--documents", 1, "--fraction", 1], "give one of --documents, --tokens and --fraction"),
        (GOOD, ["--tokens", 1], "--tokens needs"),
        (GOOD, ["--documents", 1, "--token-key", "tokens"], "--tokens needs"),
        (GOOD, ["--tokens", 2, "--token-key", "tokens"], "--tokens 2: too small for any of"),
        (GOOD, ["--tokens", 4, "--token-key", "tokens"], "asks for 4 tokens of all sources, which holds 3"),
        (GOOD, ["--tokens", 1, "--token-key", "other"], "rows.jsonl, line 1: no number under 'other'"),
        (GOOD, ["--tokens", 1, "--tokenizer", "nowhere"], "--tokenizer nowhere: no such folder"),
        (GOOD, ["--documents", 1, "--quota", "a"], "--quota a: not SOURCE=SHARE"),
        (GOOD, ["--documents", 1, "--quota", "a=x"], "--quota a=x: not SOURCE=SHARE"),
        (GOOD, ["--documents", 1, "--quota", "a=-1"], "--quota a=-1: not SOURCE=SHARE"),
        (GOOD, ["--documents", 1, "--quota", "a=0.6", "b=0.6"], "the sum is above 1"),
        (GOOD, ["--documents", 1, "--quota", "a=0.1", "a=0.2"], "a source is named twice"),
        (
            GOOD,
            ["--documents", 1, "--quota", "b=1", "--source-key", "source"],
            "--quota b: no such source; there are a",
        ),
        (GOOD, ["--documents", 1, "--source-key", "score"], "no text under 'score'"),
        (GOOD, ["--documents", 1, "--temperature", 0], "--temperature 0.0 is not above 0"),
        (GOOD, ["--documents", 1, "--temperature", 1, "--method", "random"], "nothing is ranked"),
        (GOOD, ["--documents", 1, "--temperature", 1e-310], "--temperature 1e-310: too small"),
        (GOOD, ["--documents", 1, "--seed", -1], "--seed"),
        (GOOD, ["--documents", 1, "--method", "perplexity"], "line 1: no number under 'perplexity'"),
        (GOOD, ["--documents", 1, "--output", "out.zst"], "--output out.zst: the output is JSON lines"),
        (GOOD, ["--documents", 1, "--input", "none.jsonl"], "no such file"),
        (GOOD, ["--documents", 1, "--input", "/dev/null"], "give a regular file"),
        (GOOD, ["--documents", 1, "--method", "dsir"], "--method dsir and --target"),
        (GOOD, ["--documents", 1, "--method", "dsir", "--target", "none.jsonl"], "--target none.jsonl: no such file"),
        (
            GOOD,
            ["--documents", 1, "--method", "random", "--score-key", "x"],
            "--method random needs none",
        ),
        (b"", ["--documents", 1], "no rows"),
        (b'{"score": NaN}\n', ["--documents", 1], "line 1: no number under 'score'"),
        (b'{"score": true}\n', ["--documents", 1], "line 1: no number under 'score'"),
        (b'{"score": 1' + b"0" * 400 + b"}\n", ["--documents", 1], "line 1: no number under 'score'"),
        (GOOD + b"[1]\n", ["--documents", 1], "line 2: not a JSON object"),
        (GOOD + b"{\n", ["--documents", 1], "line 2: not a JSON object"),
        (GOOD + b'{"score": 1, "t": "\xff"}\n', ["--documents", 1], "line 2: not a JSON object"),
        (b'{"score": 1, "n": 1.5}\n', ["--tokens", 1, "--token-key", "n"], "1.5 under 'n' is not a number of tokens"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, content: bytes, words: list[object], message: str
):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_bytes(content)
    usual = [("--input", "rows.jsonl"), ("--output", "out.jsonl")]
    assert run(*[word for pair in usual if pair[0] not in words for word in pair], *words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]  # nothing is left behind


def test_an_output_that_cannot_be_written_or_is_an_input(tmp_path: Path, capsys: Any):
    source = tmp_path / "rows.jsonl"
    source.write_bytes(GOOD)
    assert run("--input", source, "--documents", 1, "--output", source) == 2
    assert "is an input too" in capsys.readouterr().err
    assert run("--input", source, "--documents", 1, "--output", source / "out.jsonl") == 2
    assert "cannot be written" in capsys.readouterr().err
    table = tmp_path / "b.parquet"
    pq.write_table(pa.Table.from_pylist([{"score": 4.5, "t": b"bytes"}]), table)
    assert run("--input", table, "--documents", 1, "--output", tmp_path / "out.jsonl") == 2
    assert "b.parquet, row 1: cannot be written as JSON (a value of type bytes)" in capsys.readouterr().err
