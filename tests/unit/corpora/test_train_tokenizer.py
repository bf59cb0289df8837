"""The tool that trains a SentencePiece tokenizer."""

from __future__ import annotations

import gzip
import inspect
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers.models import BPE

from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.data.hf_tokenizers import to_hf_tokenizer
from megatron_dwm.data.tokenizers import build_tokenizer
from tests.paths import ROOT

TEXTS = [inspect.getsource(textwrap), *(f"The dog {n} jumps over\n\n\tthe naïve fox." for n in range(200))]
# Leading, trailing and repeated spaces, tabs, line ends, forms a normalization would change, unseen characters.
UNSEEN = "  def f(x):\n\t    return  'ﬁ ① e\u0301 你好 \U0001f600' # 12345 \r\n "


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/train_tokenizer.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The model's type and prefix, below a folder that the tool made."""
    folder = tmp_path_factory.mktemp(request.param)
    texts = write_jsonl(folder / "texts.jsonl", TEXTS)
    prefix = folder / "made" / "tok.v1"
    result = run_tool("--input", texts, "--output-prefix", prefix, "--vocab-size", 600, "--model-type", request.param)
    assert (result.returncode, result.stderr) == (0, "")
    size = sum(len(text.encode()) for text in TEXTS)
    assert result.stdout.startswith(
        f"{prefix}.model: {request.param}, 600 pieces, from 201 documents of {size:,} bytes ("
    )
    assert result.stdout.count("\n") == 1
    return request.param, prefix


def test_model_and_vocabulary_agree_and_nothing_else_is_left(trained: tuple[str, Path]) -> None:
    _, prefix = trained
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["tok.v1.model", "tok.v1.vocab"]
    pieces = SentencePieceProcessor(model_file=f"{prefix}.model")
    lines = Path(f"{prefix}.vocab").read_bytes().decode().split("\n")[:-1]
    names, scores = zip(*(line.rsplit("\t", 1) for line in lines), strict=True)
    assert list(names) == [pieces.id_to_piece(index) for index in range(600)]
    assert list(map(float, scores)) == pytest.approx([pieces.get_score(index) for index in range(600)], rel=1e-5)


def test_any_text_comes_back_from_its_ids(trained: tuple[str, Path]) -> None:
    pieces = SentencePieceProcessor(model_file=f"{trained[1]}.model")
    for text in (UNSEEN, TEXTS[0]):
        assert pieces.decode(pieces.encode(text)) == text
        assert pieces.unk_id() not in pieces.encode(text)


def test_bpe_has_a_counterpart_in_tokenizers(trained: tuple[str, Path]) -> None:
    kind, prefix = trained
    config = TokenizerConfig(tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=f"{prefix}.model")
    tokenizer = build_tokenizer(config)
    counterpart = to_hf_tokenizer(tokenizer, config)
    backend = getattr(counterpart, "backend_tokenizer", None)
    assert (backend is not None and isinstance(backend.model, BPE)) == (kind == "bpe")
    for text in (UNSEEN, TEXTS[0]):
        assert counterpart(text, add_special_tokens=False).input_ids == tokenizer.tokenize(text)
    assert tokenizer.eod == counterpart.eos_token_id


def test_rerun_with_the_same_text_in_other_files_writes_the_same_bytes(
    trained: tuple[str, Path], tmp_path: Path
) -> None:
    kind, prefix = trained
    first = write_jsonl(tmp_path / "first.jsonl", TEXTS[:50], key="body")
    second = tmp_path / "second.jsonl.gz"
    with gzip.open(second, "wt") as file:
        file.writelines(json.dumps({"body": text}) + "\n" for text in TEXTS[50:])
    result = run_tool(
        *("--input", first, second, "--json-key", "body", "--vocab-size", 600),
        *("--model-type", kind, "--output-prefix", tmp_path / "tok"),
    )
    assert (result.returncode, result.stderr) == (0, "")
    for suffix in (".model", ".vocab"):
        assert Path(f"{tmp_path / 'tok'}{suffix}").read_bytes() == Path(f"{prefix}{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size", "600"], "--input is missing"),
        (["--input", "{tmp}/texts.jsonl"], "--vocab-size is missing; give the number of pieces"),
        (["--input", "{tmp}/texts.jsonl", "--vocab-size", "0"], "--vocab-size 0: must be at least 1"),
        (["--input", "{tmp}/none.jsonl", "--vocab-size", "600"], "--input {tmp}/none.jsonl: no such file"),
        (["--input", "{tmp}/bad.jsonl", "--vocab-size", "600"], "--input {tmp}/bad.jsonl, line 2: no JSON object"),
        (["--input", "{tmp}/list.jsonl", "--vocab-size", "600"], "--input {tmp}/list.jsonl, line 1: no JSON object"),
        (
            ["--input", "{tmp}/texts.jsonl", "--vocab-size", "600", "--json-key", "body"],
            "--input {tmp}/texts.jsonl, line 1: no JSON object with a text under 'body'",
        ),
        (
            ["--input", "{tmp}/texts.jsonl", "--vocab-size", "9000"],
            "--vocab-size 9000 does not fit --input {tmp}/texts.jsonl: the text makes no more than ",
        ),
        (
            ["--input", "{tmp}/texts.jsonl", "--vocab-size", "200", "--model-type", "unigram"],
            "--vocab-size 200 does not fit --input {tmp}/texts.jsonl: its characters, the bytes and ",
        ),
        (
            ["--input", "{tmp}/empty.jsonl", "--vocab-size", "600"],
            "--vocab-size 600 does not fit --input {tmp}/empty.jsonl: there is no text",
        ),
        (
            ["--input", "{tmp}/texts.jsonl", "--vocab-size", "600", "--model-type", "word"],
            "argument --model-type: invalid choice: 'word'",
        ),
    ],
)
def test_bad_flags_and_input_are_one_line_and_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text('{"text": ["not", "one"]}\n')
    (tmp_path / "empty.jsonl").write_text("")
    result = run_tool(
        *(argument.format(tmp=tmp_path) for argument in arguments), "--output-prefix", tmp_path / "made" / "tok"
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message.format(tmp=tmp_path)}")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "made").exists()


def test_the_size_an_error_names_is_one_that_fits(tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    refused = run_tool("--input", texts, "--output-prefix", tmp_path / "tok", "--vocab-size", 9000)
    most = refused.stderr.partition("no more than ")[2].split()[0]
    taken = run_tool("--input", texts, "--output-prefix", tmp_path / "tok", "--vocab-size", most)
    assert (taken.returncode, taken.stderr) == (0, "")


def test_a_prefix_that_cannot_be_written_is_one_line_and_code_2(tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    # Found before the training, which would refuse this size.
    result = run_tool("--input", texts, "--output-prefix", texts / "tok", "--vocab-size", 9000)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: --output-prefix {texts}/tok: cannot be written")
    assert result.stderr.count("\n") == 1
