"""Scoring of files: the scores of the plain model, whole rows in their order, resuming, and bad input."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from megatron_dwm.analysis import scoring
from megatron_dwm.cli import score
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.corpora.preprocess import PreprocessConfig, preprocess
from megatron_dwm.corpora.readers import input_files
from megatron_dwm.errors import UserError
from megatron_dwm.weighting.weighter import Weighter
from tests.classifiers import numbers, save_classifier_of_numbers
from tests.paths import ROOT
from tests.programs import Finished, Fork, call_main

WINDOW = 16


@pytest.fixture(scope="module")
def weighter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier_of_numbers(tmp_path_factory.mktemp("weighter"))


ROWS = [{"id": n, "text": numbers(n, 1 + (n * 11) % 40), "media": [{"a": [n, None]}]} for n in range(30)]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain_scores(weighter: Path, rows: list[dict]) -> list[float]:
    """What training's own weighter gives each window, averaged by tokens."""
    model = AutoModelForSequenceClassification.from_pretrained(weighter)
    trained = Weighter(model, WeightingConfig(), torch.device("cpu"))
    found = []
    for row in rows:
        ids = [int(word) for word in row["text"].split()]
        windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
        found.append(sum(float(trained.score(torch.tensor([w]))) * len(w) for w in windows) / len(ids))
    return found


run = partial(call_main, score.main)


def output_rows(output: Path) -> list[dict]:
    return [json.loads(line) for path in sorted((output / "data").iterdir()) for line in path.read_text().splitlines()]


def test_scores_are_those_of_training_and_rows_stay_whole_and_in_order(weighter: Path, tmp_path: Path, capsys):
    first = write(tmp_path / "a.jsonl", ROWS[:12])
    second = tmp_path / "b.jsonl.gz"
    second.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS[12:20]).encode()))
    third = tmp_path / "c.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS[20:]), third)
    flags = ("--weighter", weighter, "--input", first, second, third, "--window", WINDOW, "--batch-tokens", 64)
    assert run(*flags, "--output", tmp_path / "out") == 0
    line = capsys.readouterr().out
    assert "30 documents of 3 files" in line and "docs/s" in line and "MB/s" in line
    rows = output_rows(tmp_path / "out")
    assert [{key: value for key, value in row.items() if key != "score"} for row in rows] == ROWS
    expected = plain_scores(weighter, ROWS)
    assert [row["score"] for row in rows] == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 4) for value in expected}) > 10
    assert run(*flags, "--output", tmp_path / "table", "--output-format", "parquet") == 0
    table = [row for path in sorted((tmp_path / "table/data").iterdir()) for row in pq.read_table(path).to_pylist()]
    assert [row["score"] for row in table] == pytest.approx(expected, abs=1e-5)
    assert [row["id"] for row in table] == list(range(30))


def test_files_behind_urls_are_read_and_written_as_others(weighter: Path, tmp_path: Path, capsys):
    """``file:`` goes the way of all of fsspec's file systems, S3 among them; two processes do what one does."""
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "a.jsonl", ROWS[:12])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS[12:20]).encode()))
    pq.write_table(pa.Table.from_pylist(ROWS[20:]), folder / "c.parquet")
    flags = ("--weighter", weighter, "--window", WINDOW)
    assert run(*flags, "--input", folder, "--output", tmp_path / "plain") == 0
    url = f"file://{tmp_path}"
    remote = (*flags, "--workers", 2, "--output", f"{url}/out")
    capsys.readouterr()
    assert run(*remote, "--input", f"{url}/in") == 0
    assert "30 documents of 3 files" in capsys.readouterr().out
    assert output_rows(tmp_path / "out") == output_rows(tmp_path / "plain")
    assert run(*remote, "--input", f"{url}/in") == 0
    assert "scored 0 documents" in capsys.readouterr().out  # they are done
    assert run(*remote, "--input", f"{url}/in/*.gz") == 2
    assert "was made with other input or flags" in capsys.readouterr().err
    for words, said in {
        ("--input", f"{url}/in/*.txt"): f"--input {url}/in/*.txt: no such file",
        ("--input", f"{url}/nowhere.jsonl"): f"--input {url}/nowhere.jsonl: no such file",
        ("--input", "nothing://x/y.jsonl"): "--input nothing://x/y.jsonl: Protocol not known: nothing",
    }.items():
        assert run(*flags, *words, "--output", tmp_path / "none") == 2
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_one_file_is_shared_by_several_tasks_and_a_killed_one_loses_no_row(weighter: Path, tmp_path: Path):
    """Lines belong to the part that they begin in, whatever their length; one part is as if it was not finished."""
    rows = [{"id": n, "text": numbers(n, 3), "long": "x" * (n % 3 * 200)} for n in range(30)]
    source = write(tmp_path / "a.jsonl", rows)
    argv = ("--weighter", weighter, "--input", source, "--window", WINDOW, "--split-bytes", 1000)
    output = tmp_path / "out"
    assert run(*argv, "--output", output) == 0
    parts = sorted((output / "data").iterdir())
    assert len(parts) > 5
    assert [{**row, "score": 0} for row in output_rows(output)] == [{**row, "score": 0} for row in rows]
    expected = [path.read_bytes() for path in parts]
    parts[2].unlink()
    (output / "logs/completions/00002").unlink()
    assert run(*argv, "--output", output) == 0
    assert [path.read_bytes() for path in sorted((output / "data").iterdir())] == expected
    with source.open("a") as file:
        file.write("{\n")
    assert run(*argv, "--output", tmp_path / "bad") == 2


def test_an_indexed_dataset_is_scored_as_its_texts_are(weighter: Path, tmp_path: Path, capsys):
    """Its documents end with a token that no text has; with another tokenizer, texts are made of the tokens."""
    source = write(tmp_path / "a.jsonl", [{"text": numbers(n, 1 + n)} for n in range(20)])
    made = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path / "with_end")}
    tokenizer = AutoTokenizer.from_pretrained(weighter)
    tokenizer.eos_token = "50"
    tokenizer.save_pretrained(made["tokenizer_model"])
    config = PreprocessConfig(input=[str(source)], output_prefix=str(tmp_path / "a"), append_eod=True)
    preprocess(config, TokenizerConfig(**made))
    usual = ("--weighter", weighter, "--window", WINDOW)
    assert run(*usual, "--input", source, "--output", tmp_path / "texts") == 0
    flags = ("--input", tmp_path / "a_text_document", "--dataset-tokenizer", made["tokenizer_model"])
    assert run(*usual, *flags, "--output", tmp_path / "set", "--split-bytes", 100) == 0
    assert "20 documents of 1 files" in capsys.readouterr().out
    expected = [row["score"] for row in output_rows(tmp_path / "texts")]
    found = output_rows(tmp_path / "set")
    assert [row["document"] for row in found] == list(range(20)) and found[3]["text"] == numbers(3, 4)
    assert [row["score"] for row in found] == pytest.approx(expected, abs=1e-5)
    assert run(*usual, *flags[:2], "--output", tmp_path / "same") == 0  # the end is a token to the weighter
    assert [row["score"] for row in output_rows(tmp_path / "same")] != pytest.approx(expected, abs=1e-5)
    (tmp_path / "a_text_document.bin").write_bytes(b"\x01")
    assert run(*usual, *flags, "--output", tmp_path / "damaged") == 2
    assert "has 1 bytes where its index says" in capsys.readouterr().err


def test_perplexity_is_that_of_the_language_model(tmp_path: Path, weighter: Path):
    folder = tmp_path / "model"
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=51, max_position_embeddings=64, **sizes)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(weighter)
    tokenizer.eos_token = "50"
    tokenizer.save_pretrained(folder)
    source = write(tmp_path / "a.jsonl", ROWS[:8])
    flags = ("--language-model", folder, "--input", source, "--window", WINDOW, "--batch-tokens", 64)
    assert run(*flags, "--output", tmp_path / "out") == 0
    expected = []
    for row in ROWS[:8]:
        ids, total = [int(word) for word in row["text"].split()], 0.0
        for start in range(0, len(ids), WINDOW - 1):
            window = torch.tensor([[50, *ids[start : start + WINDOW - 1]]])
            total += float(model(input_ids=window, labels=window).loss.detach()) * (window.shape[1] - 1)
        expected.append(math.exp(total / len(ids)))
    assert [row["perplexity"] for row in output_rows(tmp_path / "out")] == pytest.approx(expected, rel=1e-4)
    assert max(expected) > 1.5 * min(expected)
    assert run(*flags, "--weighter", weighter, "--output", tmp_path / "both") == 2


def test_the_rules_for_long_documents_differ(weighter: Path, tmp_path: Path):
    source = write(tmp_path / "a.jsonl", [{"text": numbers(3, 3 * WINDOW)}])
    found = {}
    for rule in ("mean", "max", "first"):
        flags = ("--input", source, "--window", WINDOW, "--rule", rule, "--output", tmp_path / rule)
        assert run("--weighter", weighter, *flags) == 0
        (found[rule],) = (row["score"] for row in output_rows(tmp_path / rule))
    head = [{"text": numbers(3, WINDOW)}]
    assert found["first"] == pytest.approx(plain_scores(weighter, head)[0], abs=1e-5)
    assert found["max"] > found["mean"] and found["max"] >= found["first"] != found["mean"]


def test_a_command_that_was_killed_goes_on_where_it_was(weighter: Path, tmp_path: Path):
    """The first run dies by SIGKILL in the second file, whose rows were being written."""
    sources = [write(tmp_path / f"{n}.jsonl", ROWS[10 * n : 10 * n + 10]) for n in range(3)]
    output = tmp_path / "out"
    argv = ["--weighter", weighter, "--output", output, "--window", WINDOW, "--input", *sources]

    def killed() -> None:
        os.setsid()
        plain, calls = scoring._row, itertools.count(1)

        def row(*arguments: Any) -> Any:
            if next(calls) == 15:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments)

        scoring._row = row
        run(*argv)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and process.pid is not None
    os.killpg(process.pid, signal.SIGKILL)  # the executor's helper process outlives it
    (finished,) = (output / "data").iterdir()
    before = finished.stat().st_mtime_ns
    for given in (output, finished, output / "data/*.jsonl"):  # a selection, or a dataset, of a part of the documents
        with pytest.raises(UserError, match=f"--input {re.escape(str(given))}: score has finished 1 of 3 tasks there"):
            input_files([str(given)])
    assert run(*argv) == 0
    assert input_files([str(output / "data")])[0] == str(finished)
    assert finished.stat().st_mtime_ns == before
    assert [row["id"] for row in output_rows(output)] == list(range(30))


def test_a_second_call_is_refused_while_one_is_at_work(weighter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both would write to the same files, so that one publishes what the other has not finished."""
    argv = ["--weighter", weighter, "--output", tmp_path / "out", "--input", write(tmp_path / "rows.jsonl", ROWS)]
    others, score_all = list[Finished](), scoring.ScoringStep.run

    def score_beside(step: scoring.ScoringStep, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        others.append(Fork(lambda: score.main([str(word) for word in argv])).finish())
        return score_all(step, data, rank, world_size)

    monkeypatch.setattr(scoring.ScoringStep, "run", score_beside)
    assert run(*argv) == 0
    said = f"error: {tmp_path}/out/logs: another process is writing there; wait until it has finished\n"
    assert [(other.returncode, other.stderr) for other in others] == [(2, said)]
    assert [row["id"] for row in output_rows(tmp_path / "out")] == list(range(30))


@pytest.mark.parametrize("changed", ["input.jsonl", "weighter/config.json"])
def test_scores_of_files_that_have_changed_are_not_mixed_with_older_ones(
    weighter: Path, tmp_path: Path, capsys, changed: str
):
    """Of the same path and size: only the time of the change tells."""
    shutil.copytree(weighter, tmp_path / "weighter")
    source = write(tmp_path / "input.jsonl", ROWS[:4])
    flags = ("--weighter", tmp_path / "weighter", "--input", source, "--output", tmp_path / "out")
    assert run(*flags) == 0 and run(*flags) == 0
    os.utime(tmp_path / changed, (1, 1))
    assert run(*flags) == 2
    assert "was made with other input or flags" in capsys.readouterr().err


def test_scoring_needs_no_megatron(weighter: Path, tmp_path: Path):
    source = write(tmp_path / "a.jsonl", ROWS[:3])
    flags = ["--weighter", str(weighter), "--input", str(source), "--output", str(tmp_path / "out")]
    program = f"import sys, runpy; sys.argv = ['score_data.py', *{flags}]; runpy.run_path('tools/score_data.py', "
    program += "run_name='__main__'); print([name for name in sys.modules if name.split('.')[0] == 'megatron'])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("bad", ['{"text": ""}', '{"other": "1"}', "[1]", "{", '{"text": 3}'])
def test_a_row_that_is_no_document_ends_it_or_is_skipped(weighter: Path, tmp_path: Path, capsys, bad: str):
    good = write(tmp_path / "a.jsonl", ROWS[:2])
    source = tmp_path / "b.jsonl"
    source.write_text(json.dumps(ROWS[2]) + "\n" + bad + "\n")
    argv = ("--weighter", weighter, "--input", good, source)
    assert run(*argv, "--output", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "b.jsonl, line 2" in message and "--skip-malformed" in message
    assert [row["id"] for row in output_rows(tmp_path / "out")] == [0, 1]
    assert run(*argv, "--output", tmp_path / "skipped", "--skip-malformed") == 0
    assert "skipped 1 rows" in capsys.readouterr().out
    assert [row["id"] for row in output_rows(tmp_path / "skipped")] == [0, 1, 2]


def test_a_table_keeps_the_types_of_its_columns(weighter: Path, tmp_path: Path):
    """Those that its first rows do not show among them."""
    table = pa.table(
        {
            "content": ["1 2", "3", "4 5 6"],
            "nothing at first": pa.array([None, 7, None], pa.int32()),
            "empty": pa.array([[], ["a"], None], pa.list_(pa.string())),
            "map": pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int64())),
            "object": pa.array([None, {"a": [1.5]}, {"a": None}]),
            "time": pa.array([0, 1, 2], pa.timestamp("ms", tz="UTC")),
            "number": [math.nan, 1.0, math.inf],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    flags = ("--weighter", weighter, "--input", tmp_path / "a.parquet", "--json-key", "content")
    assert run(*flags, "--output", tmp_path / "out", "--output-format", "parquet") == 0
    found = pq.read_table(tmp_path / "out/data/00000.parquet")
    assert found.schema == table.schema.append(pa.field("score", pa.float64()))
    assert repr(found.drop(["score"]).to_pylist()) == repr(table.to_pylist())  # so that NaN equals NaN


def test_fields_that_only_later_rows_have_are_not_lost(weighter: Path, tmp_path: Path, capsys):
    rows = [{"text": "1", "more": {"a": None}, "n": None}] * 1000
    flags = ("--weighter", weighter, "--output-format", "parquet", "--output", tmp_path / "out", "--input")
    assert run(*flags, write(tmp_path / "a.jsonl", [*rows, {"text": "1", "more": {"a": None, "b": 2}, "n": None}])) == 2
    assert "the rows do not form a table" in capsys.readouterr().err
    (tmp_path / "out").rename(tmp_path / "before")
    assert run(*flags, write(tmp_path / "a.jsonl", [*rows, {"text": "2", "more": None, "n": None}])) == 0
    assert pq.read_table(tmp_path / "out/data/00000.parquet").to_pylist()[-1]["more"] is None


def test_what_cannot_be_used_is_one_line(weighter: Path, tmp_path: Path, capsys):
    source = write(tmp_path / "a.jsonl", ROWS[:2])
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1 and nothing else")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "other.txt").write_text("mine")
    unfit = tmp_path / "unfit"
    subprocess.run(["cp", "-r", weighter, unfit], check=True)
    tokenizer = json.loads((unfit / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["51"] = 51
    (unfit / "tokenizer.json").write_text(json.dumps(tokenizer))
    usual = {"--weighter": weighter, "--input": source, "--output": tmp_path / "out"}
    for flag, value, words in [
        ("--weighter", tmp_path / "none", "no config.json"),
        ("--weighter", unfit, "tokenizer has 52 tokens"),
        ("--input", damaged, "unreadable"),
        ("--input", tmp_path / "none.jsonl", "no such file"),
        ("--output", foreign, "does not hold scores"),
        ("--output", source, "cannot be written"),
        ("--score-key", "id", "has 'id' already"),
        ("--batch-tokens", 0, "must be at least 1"),
        ("--input", write(tmp_path / "empty.jsonl", []), "no documents"),
    ]:
        argv = [
            word for item in {**usual, "--output": tmp_path / f"out{words[:4]}", flag: value}.items() for word in item
        ]
        assert run(*argv) == 2, words
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and words in message, message
    for name, row, words in [
        ("jsonl", {"text": "1", "n": 2**70}, "cannot be written"),
        ("jsonl", {"text": "1", "n": [{"a": None}, {"a": math.inf}]}, "a number that is not finite"),
        ("parquet", {"text": "1", "id": "word", "media": []}, "do not form a table"),
        ("parquet", {"text": "1", "id": 1}, "different fields"),
        ("parquet", {"text": "1", "id": 2**70, "media": []}, "too large to convert"),
    ]:
        mixed = write(tmp_path / "mixed.jsonl", [*ROWS[:2], row])
        mixed.write_text(mixed.read_text().replace("Infinity", "1e400"))
        flags = {**usual, "--input": mixed, "--output-format": name, "--output": tmp_path / f"out{words}"}
        assert run(*[word for item in flags.items() for word in item]) == 2, words
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and words in message, message
    assert run(*[word for item in usual.items() for word in item]) == 0
    assert run(*[word for item in {**usual, "--rule": "max"}.items() for word in item]) == 2
    assert "with other input or flags" in capsys.readouterr().err
