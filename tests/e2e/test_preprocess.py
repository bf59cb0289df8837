"""Preprocessing: the bytes that Megatron-LM's tool writes, and what it leaves to chance."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from tests.fixtures.preprocess.inputs import CASES, SENTENCEPIECE, TEXTS, keys_of, write_inputs
from tests.paths import ROOT
from tests.programs import run_program

RECORDED = json.loads((ROOT / "tests/fixtures/preprocess/megatron_lm.json").read_text())
NUMBERS = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the tool in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["preprocess_data.py", *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "tools/preprocess_data.py"), run_name="__main__")
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


def declared_flags(case: list[str], inputs: Path) -> list[str]:
    return [flag.format(folder=inputs) for flag in case]


def hashes(folder: Path, keys: list[str]) -> dict[str, dict[str, str]]:
    """SHA-256 of the data sets below ``folder``, where there is nothing else."""
    names = {(key, suffix): f"made_{key}_document.{suffix}" for key in keys for suffix in ("bin", "idx")}
    assert sorted(path.name for path in folder.iterdir()) == sorted(names.values())
    found: dict[str, dict[str, str]] = {key: {} for key in keys}
    for (key, suffix), name in names.items():
        found[key][suffix] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return found


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_the_cases_are_those_that_were_recorded() -> None:
    assert {name: case["flags"] for name, case in RECORDED.items()} == CASES


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_are_megatron_lms(name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    workers = case[case.index("--partitions") + 1] if "--partitions" in case else 1
    flags = declared_flags(case, inputs)
    assert run_tool(monkeypatch, *flags, "--workers", workers, "--output-prefix", tmp_path / "made") == 0
    assert hashes(tmp_path, keys_of(case)) == RECORDED[name]["sha256"]


@pytest.mark.parametrize(
    ("name", "workers"), [("keys-eod", 2), ("one-key", 3), ("partitions-keys-eod", 4), ("null-4-bytes", 2)]
)
def test_more_workers_write_the_same(
    name: str, workers: int, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = declared_flags(CASES[name], inputs)
    assert run_tool(monkeypatch, *flags, "--workers", workers, "--output-prefix", tmp_path / "made") == 0
    assert hashes(tmp_path, keys_of(CASES[name])) == RECORDED[name]["sha256"]


def test_gzip_of_one_partition_is_read_too(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Megatron-LM unpacks only what it deals out to several partitions.
    flags = ["--input", inputs / "texts.jsonl.gz", *declared_flags(SENTENCEPIECE, inputs), "--append-eod"]
    assert run_tool(monkeypatch, *flags, "--workers", 1, "--output-prefix", tmp_path / "made") == 0
    assert hashes(tmp_path, ["text"]) == RECORDED["one-key-eod"]["sha256"]


@pytest.mark.parametrize(("partitions", "recorded"), [(1, "one-key"), (3, "partitions")])
def test_files_of_a_pattern_are_one_input(
    partitions: int, recorded: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (inputs / "texts.jsonl").read_text().split("\n")
    (tmp_path / "parts").mkdir()
    pattern = str(tmp_path / "parts" / "part*.jsonl*")
    for name in ("part-b.jsonl", "part-a.jsonl.gz", "part-c.jsonl"):
        (tmp_path / "parts" / name).touch()
    # The file system decides which file is first; give it the first lines.
    for path, part in zip(glob.glob(pattern), (lines[:40], lines[40:41], lines[41:]), strict=True):
        content = "\n".join(part).encode()
        Path(path).write_bytes(gzip.compress(content) if path.endswith(".gz") else content)
    flags = ["--input", pattern, *declared_flags(SENTENCEPIECE, inputs), "--partitions", partitions]
    assert run_tool(monkeypatch, *flags, "--workers", partitions, "--output-prefix", tmp_path / "out" / "made") == 0
    assert hashes(tmp_path / "out", ["text"]) == RECORDED[recorded]["sha256"]


def test_empty_documents_and_sentences_have_no_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[list[str]] = [["1 2"], [], ["3", "4 5"]]
    path = write_lines(tmp_path / "texts.jsonl", [json.dumps({"text": text}) for text in texts])
    flags = ["--input", path, *NUMBERS, "--append-eod", "--output-prefix", tmp_path / "out" / "made"]
    assert run_tool(monkeypatch, *flags, "--workers", 1) == 0
    data = IndexedDataset(str(tmp_path / "out" / "made_text_document"))
    assert [list(data[index]) for index in range(len(data))] == [[1, 2, 100], [3], [4, 5, 100]]
    assert np.array_equal(data.document_indices, [0, 1, 1, 3])


MALFORMED = [
    ("{", "not JSON (Expecting property name enclosed in double quotes"),
    ("x", "not JSON (Expecting value"),
    ("[1]", "not a JSON object"),
    ('{"body": "1"}', "no key 'text'"),
    ('{"text": null}', "the value of 'text' is not a string"),
    ('{"text": ["1", 2]}', "the value of 'text' is not a string"),
    ('{"text": "one"}', "the value of 'text' cannot be tokenized (invalid literal for int()"),
    ('{"text": "70000"}', "the value of 'text' cannot be tokenized ("),
    (f'{{"text": {"9" * 5000}}}', "the value of 'text' is not a string"),
    (f'{{"text": "{"9" * 5000}"}}', "the value of 'text' cannot be tokenized (Exceeds the limit (4300"),
    (f'{{"text": "{"x" * 5000}"}}', "the value of 'text' cannot be tokenized (invalid literal for int()"),
    ('{"text": "1", "n": 1' + "0" * 5000, "not JSON (Expecting ',' delimiter"),
    ('{"text": "\udc80"}', "not UTF-8"),
    ("[" * 100_000, "not JSON ("),
]


def write_malformed(path: Path, bad: str) -> Path:
    path.write_bytes(f'{{"text": "1"}}\n{bad}\n{{"text": "2"}}\n'.encode(errors="surrogateescape"))
    return path


@pytest.mark.parametrize(("bad", "reason"), MALFORMED)
def test_a_malformed_line_is_named_and_nothing_is_written(
    bad: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_malformed(tmp_path / "texts.jsonl", bad)
    out = tmp_path / "out"
    out.mkdir()
    (out / "made_text_document.bin").write_text("old")
    code = run_tool(monkeypatch, "--input", path, *NUMBERS, "--workers", 1, "--output-prefix", out / "made")
    assert code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: --input {path}, line 2: {reason}")
    assert message.endswith("; correct it or give --skip-malformed\n")
    assert message.count("\n") == 1 and len(message) < 600
    assert {path.name: path.read_text() for path in out.iterdir()} == {"made_text_document.bin": "old"}


@pytest.mark.parametrize("workers", [1, 2])
def test_malformed_lines_are_skipped_and_counted(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = "\n".join(line for line, _ in MALFORMED)
    path = write_malformed(tmp_path / "texts.jsonl", bad)
    clean = write_lines(tmp_path / "clean.jsonl", ['{"text": "1"}', '{"text": "2"}'])
    flags = [*NUMBERS, "--workers", workers, "--output-prefix"]
    assert run_tool(monkeypatch, "--input", path, *flags, tmp_path / "out" / "made", "--skip-malformed") == 0
    first = f"{path}, line 2: {MALFORMED[0][1]}"
    assert capsys.readouterr().err.startswith(
        f"warning: {len(MALFORMED)} malformed documents were skipped, the first: {first}"
    )
    assert run_tool(monkeypatch, "--input", clean, *flags, tmp_path / "expected" / "made") == 0
    assert hashes(tmp_path / "out", ["text"]) == hashes(tmp_path / "expected", ["text"])


def test_numbers_that_python_does_not_convert_are_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f'{{"id": {"9" * 5000}, "text": "1 2", "score": 1e999}}', '{"text": "3", "id": -0}']
    path = write_lines(tmp_path / "texts.jsonl", lines)
    out = tmp_path / "out" / "made"
    assert run_tool(monkeypatch, "--input", path, *NUMBERS, "--workers", 1, "--output-prefix", out) == 0
    data = IndexedDataset(f"{out}_text_document")
    assert [list(data[index]) for index in range(len(data))] == [[1, 2], [3]]


def test_a_path_that_is_not_utf_8_is_one_line(tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    os.mkdir(folder)
    path = write_lines(Path(folder, "texts.jsonl"), ['{"text": "1"}'])
    code, error = run_in_process("--input", path, *NUMBERS, "--workers", 1, "--output-prefix", f"{folder}/made")
    assert code == 2 and error.startswith("error: ") and "--input" in error and "is not UTF-8; rename it" in error
    assert error.count("\n") == 1 and os.listdir(folder) == ["texts.jsonl"]


def run_in_process(*arguments: object) -> tuple[int, str]:
    """Run the tool in a process of its own; returns its exit code and what it wrote to standard error."""
    result = run_program("tools/preprocess_data.py", *arguments)
    # What was written is said in one line, in characters of every terminal; nothing if it failed.
    lines = result.stdout.splitlines()
    assert [line.split(": ")[-1] for line in lines] == ([] if result.returncode else ["1 documents, 1 tokens"])
    return result.returncode, result.stderr


def test_each_file_has_data_sets_of_its_own_and_those_that_are_there_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, first in (("a.jsonl", 1), ("b.x.jsonl.gz", 3)):
        opened: Any = gzip.open if name.endswith(".gz") else open
        with opened(tmp_path / name, "wt") as file:
            file.write(f'{{"text": "{first} {first + 1}"}}\n')
    argv = [
        "--input",
        tmp_path / "*.jsonl*",
        *NUMBERS,
        "--output-per-file",
        "--output-prefix",
        tmp_path / "out" / "made",
    ]
    names = [Path(path).name.partition(".jsonl")[0] for path in glob.glob(str(tmp_path / "*.jsonl*"))]
    blocked = tmp_path / "out" / f"made_{names[1]}_text_document.bin"
    blocked.mkdir(parents=True)
    assert run_tool(monkeypatch, *argv) == 2
    blocked.rmdir()
    capsys.readouterr()
    assert run_tool(monkeypatch, *argv) == 0
    assert "Continuing after 1 files" in capsys.readouterr().out
    expected = {f"made_{name}_text_document{suffix}" for name in ("a", "b.x") for suffix in (".bin", ".idx")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    for name, tokens in (("a", [1, 2]), ("b.x", [3, 4])):
        made = IndexedDataset(str(tmp_path / f"out/made_{name}_text_document"))
        assert made[0].tolist() == tokens
    assert run_tool(monkeypatch, *argv[:-1], f"{tmp_path}/folder/") == 0
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {name.removeprefix("made_") for name in expected}
    (tmp_path / "a.json").write_text("{}")
    assert run_tool(monkeypatch, *argv[:1], tmp_path / "a.json", *argv[1:]) == 2
    assert "have the same name; rename one" in capsys.readouterr().err


def test_segments_change_no_byte_of_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lines(tmp_path / "texts.jsonl", [f'{{"text": "{n} {n + 1}"}}' for n in range(50)])
    flags = ["--input", source, *NUMBERS, "--partitions", "2", "--workers", "2", "--output-prefix"]
    assert run_tool(monkeypatch, *flags, tmp_path / "whole" / "made") == 0
    assert run_tool(monkeypatch, *flags, tmp_path / "parts" / "made", "--resume-interval", "7") == 0
    assert hashes(tmp_path / "parts", ["text"]) == hashes(tmp_path / "whole", ["text"])


def test_text_that_the_tokenizer_cannot_encode_is_malformed(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "texts.jsonl", ['{"text": "good"}', '{"text": "half of a pair: \\ud800"}'])
    flags = ["--input", path, *declared_flags(SENTENCEPIECE, inputs), "--output-prefix", tmp_path / "out" / "made"]
    assert run_tool(monkeypatch, *flags, "--workers", 1) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: --input {path}, line 2: the value of 'text' cannot be tokenized ('utf-8' ")


def test_a_malformed_line_found_by_a_worker_process_ends_the_command_alike(tmp_path: Path) -> None:
    path = write_malformed(tmp_path / "texts.jsonl", "{")
    flags = ["--input", path, *NUMBERS, "--workers", "2", "--output-prefix", tmp_path / "out" / "made"]
    result = run_program("tools/preprocess_data.py", *flags)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: --input {path}, line 2: not JSON")
    assert result.stderr.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output-prefix", "{tmp}/out"], "--input is missing; give a path"),
        (["--input", "{tmp}/texts.jsonl"], "--output-prefix is missing; give a path"),
        (["--input", "{tmp}/none*", "--output-prefix", "{tmp}/out"], "--input {tmp}/none*: no such file;"),
        (["--input", "{tmp}/empty.jsonl", "--output-prefix", "{tmp}/out"], "--input {tmp}/empty.jsonl: no documents;"),
        (
            ["--input", "{tmp}/cut.jsonl.gz", "--output-prefix", "{tmp}/out"],
            "--input {tmp}/cut.jsonl.gz: unreadable after record 1 (",
        ),
        (
            ["--input", "{tmp}/texts.jsonl", "--output-prefix", "{tmp}/texts.jsonl/made"],
            "--output-prefix {tmp}/texts.jsonl/made: cannot be written (",
        ),
        (
            ["--input", "{tmp}/texts.jsonl", "--output-prefix", "s3://bucket/out"],
            "--output-prefix s3://bucket/out is a URL; give a path on this machine",
        ),
        (
            ["--input", "{tmp}/texts.jsonl", "--output-prefix", "{tmp}/out", "--partitions", "3", "--workers", "2"],
            "--workers 2 is not a multiple of --partitions 3; change one",
        ),
        (
            ["--input", "{tmp}/texts.jsonl", "--output-prefix", "{tmp}/out", "--partitions", "0"],
            "--partitions 0: must be at least 1",
        ),
        (
            ["--input", "{tmp}/texts.jsonl", "--output-prefix", "{tmp}/out", "--workers", "99999"],
            "--workers 99999: must be at most 1024",
        ),
    ],
)
def test_bad_flags_and_paths_are_one_line_and_code_2(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_lines(tmp_path / "texts.jsonl", ['{"text": "1"}'])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "1"}\n')[:-9])
    before = sorted(tmp_path.iterdir())
    assert run_tool(monkeypatch, *(flag.format(tmp=tmp_path) for flag in flags), *NUMBERS) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message.format(tmp=tmp_path)}")
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split-sentences"], "--split-sentences is not supported: documents are kept whole; leave the flag out"),
        (["--padded-vocab-size", "128"], "--padded-vocab-size is not supported: it has no effect on the data;"),
        (["--vocab-extra-ids", "100"], "--vocab-extra-ids is not supported: only GPT models are supported;"),
        (["--tiktoken-special-tokens", "<s>"], "--tiktoken-special-tokens is not supported: "),
        (
            ["--tokenizer-type", "BertWordPieceCase"],
            "--tokenizer-type BertWordPieceCase is not supported: it is for models other",
        ),
        (["--no-such-flag"], "unknown flag --no-such-flag"),
    ],
)
def test_flags_of_megatron_lms_tool_that_are_not_here_are_refused_with_a_reason(
    flags: list[str],
    message: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    required = [*declared_flags([*TEXTS, *SENTENCEPIECE], inputs), "--output-prefix", tmp_path / "made"]
    assert run_tool(monkeypatch, *required, *flags) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_a_rerun_replaces_what_is_there(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = ["--workers", 1, "--output-prefix", tmp_path / "made"]
    assert run_tool(monkeypatch, *declared_flags(CASES["one-key"], inputs), *prefix) == 0
    shutil.copy(tmp_path / "made_text_document.bin", tmp_path / "made_text_document.idx")
    assert run_tool(monkeypatch, *declared_flags(CASES["one-key-eod"], inputs), *prefix) == 0
    assert hashes(tmp_path, ["text"]) == RECORDED["one-key-eod"]["sha256"]
