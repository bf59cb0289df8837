"""How the built-in corpus is made of a library; tests/e2e/test_quickstart.py looks into that of this interpreter."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_dwm.corpora.corpus import CorpusConfig, write_corpus
from megatron_dwm.corpora.standard_library import standard_library_corpus
from megatron_dwm.errors import UserError
from tests.paths import ROOT

Lines = dict[tuple[str, str], list[dict[str, str]]]  # (source, part) -> the objects of its file


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/build_corpus.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def long_paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of 8 words or more, whatever their layout."""
    for paragraph in re.sub(r"\n[ \t]+\n", "\n\n", text).split("\n\n"):
        words = paragraph.split()
        if len(words) >= 8:
            yield " ".join(words)


def library(folder: Path) -> Path:
    """A library of small modules that share text."""
    for number in range(300):
        words = [f"word{number}x{index}" for index in range(40)]
        (folder / f"module{number}.py").write_text(
            f'"""{" ".join(words)}\n\nThis very paragraph is in every one of the modules here.\n"""\n'
            f"# {' '.join(reversed(words))}\n"
            f"def single{number}(a):\n    {chr(10).join(f'    {word} = a.{word}' for word in words[:12]).strip()}\n"
            "def shared(a, b):\n    '''Add.'''\n    return a + b + a.c + b.c + a.d + b.d + a.e + b.e\n"
        )
    (folder / "broken.py").write_text("def :\n")
    return folder


def small(seed: int = 1) -> CorpusConfig:
    return CorpusConfig(output="not used", seed=seed, prose_bytes=8000, code_bytes=8000, heldout_bytes=4000)


def test_text_that_modules_share_is_kept_once(tmp_path: Path) -> None:
    corpus = standard_library_corpus(small(), library(tmp_path))
    texts = [item.text for parts in corpus.values() for documents in parts.values() for item in documents]
    assert sum("This very paragraph" in text for text in texts) <= 1
    assert sum("def shared" in text for text in texts) <= 1
    assert sum("def single" in text for text in texts) > 10


def test_shuffling_keeps_the_words_and_changes_their_order(tmp_path: Path) -> None:
    corpus = standard_library_corpus(small(), library(tmp_path))
    for documents in corpus["shuffled"].values():
        for document in documents:
            words = document.text.split()
            in_document = [word for word in words if word.startswith("word")]
            number = in_document[0].split("x")[0]
            assert sorted(in_document) == sorted(f"{number}x{index}" for index in range(40))
            assert in_document != [f"{number}x{index}" for index in range(40)]


def test_rerun_writes_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    (tmp_path / "library").mkdir()
    root = library(tmp_path / "library")
    for name, seed in (("first", 1), ("again", 1), ("again", 1), ("other", 2)):
        write_corpus(standard_library_corpus(small(seed), root), tmp_path / name)

    def written(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    assert written("first") == written("again")
    assert written("first").keys() == written("other").keys()
    assert written("first") != written("other")


def test_a_library_without_sources_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no text is left for prose\.train; lower --heldout-bytes 200000"):
        standard_library_corpus(CorpusConfig(output="x"), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: --output is missing"),
        (["--output", "{tmp}/x", "--heldout-bytes", "0"], "error: --heldout-bytes 0: must be at least 1"),
        (["--output", "{tmp}/x", "--seed", "one"], "error: argument --seed: invalid int value: 'one'"),
        (["--output", "{tmp}/file"], "error: --output {tmp}/file: "),
    ],
)
def test_bad_flags_are_one_line_and_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run_tool(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.returncode == 2
    assert result.stderr.startswith(message.format(tmp=tmp_path))
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
