"""The built-in corpus: what is in it, and that no text is in two places."""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from megatron_dwm.corpora.corpus import PARTS, CorpusConfig, write_corpus
from megatron_dwm.corpora.standard_library import standard_library_corpus
from megatron_dwm.errors import UserError
from tests.paths import ROOT

SOURCES = ("prose", "code", "comments", "shuffled")
TEXTS = ("prose", "comments", "shuffled")

Lines = dict[tuple[str, str], list[dict[str, str]]]  # (source, part) -> the objects of its file


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/build_corpus.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def read(folder: Path) -> Lines:
    return {
        (source, part): [json.loads(line) for line in (folder / f"{source}.{part}.jsonl").open(encoding="utf-8")]
        for source in SOURCES
        for part in PARTS
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The corpus of the Python that runs the tests, and what the tool printed."""
    folder = tmp_path_factory.mktemp("corpus") / "made"
    result = run_tool("--output", str(folder))
    assert (result.returncode, result.stderr) == (0, "")
    return folder, result.stdout


@pytest.fixture(scope="module")
def lines(built: tuple[Path, str]) -> Lines:
    return read(built[0])


def long_paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of 8 words or more, whatever their layout."""
    for paragraph in re.sub(r"\n[ \t]+\n", "\n\n", text).split("\n\n"):
        words = paragraph.split()
        if len(words) >= 8:
            yield " ".join(words)


def bodies(text: str) -> Iterator[str]:
    """The bodies of 8 words or more of functions and classes, as source with its indentation."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first, last = node.body[0], node.body[-1]
            start = min([first.lineno, *(item.lineno for item in getattr(first, "decorator_list", []))])
            body = "\n".join(text.split("\n")[start - 1 : last.end_lineno])
            if len(body.split()) >= 8:
                yield body


def strings(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_files_are_exactly_the_sources_and_parts(built: tuple[Path, str]) -> None:
    assert sorted(path.name for path in built[0].iterdir()) == sorted(
        f"{source}.{part}.jsonl" for source in SOURCES for part in PARTS
    )


def test_lines_name_their_source_and_have_unique_ids(lines: Lines) -> None:
    for (source, _), objects in lines.items():
        for item in objects:
            assert item.keys() == {"text", "source", "id"}
            assert item["source"] == source
            assert len(item["text"].encode()) >= 200
    ids = Counter(item["id"] for item in chain(*lines.values()))
    assert max(ids.values()) == 1


def test_the_table_tells_documents_and_bytes(built: tuple[Path, str], lines: Lines) -> None:
    rows = {row.split()[0]: row.replace(",", "").split()[1:] for row in built[1].splitlines()[1:]}
    for source in SOURCES:
        sizes = [
            (len(lines[source, part]), sum(len(x["text"].encode()) for x in lines[source, part])) for part in PARTS
        ]
        assert rows[source] == [str(number) for number in chain(*sizes)]


def test_sizes_suit_an_experiment_with_a_small_fraction_of_good_text(lines: Lines) -> None:
    sizes = {key: sum(len(item["text"].encode()) for item in objects) for key, objects in lines.items()}
    assert 800_000 <= sizes["prose", "train"] <= 1_200_000
    assert 2_000_000 <= sizes["code", "train"] <= 2_500_000
    assert 2_000_000 <= sizes["shuffled", "train"] <= 2_500_000
    assert 250_000 <= sizes["comments", "train"] <= 1_200_000
    for source in SOURCES:
        for part in ("target", "test"):
            assert 150_000 <= sizes[source, part] <= 200_000


def test_no_paragraph_of_eight_words_is_in_two_places(lines: Lines) -> None:
    found = Counter(
        paragraph
        for (source, _), objects in lines.items()
        if source in TEXTS
        for item in objects
        for paragraph in long_paragraphs(item["text"])
    )
    assert len(found) > 10_000
    assert [paragraph for paragraph, times in found.items() if times > 1] == []


def test_no_body_of_a_function_or_class_is_in_two_places(lines: Lines) -> None:
    found = Counter(body for part in PARTS for item in lines["code", part] for body in bodies(item["text"]))
    assert len(found) > 5_000
    assert [body for body, times in found.items() if times > 1] == []


def test_no_paragraph_of_documentation_is_a_string_of_the_code(lines: Lines) -> None:
    documentation = {
        paragraph
        for (source, _), objects in lines.items()
        if source in TEXTS
        for item in objects
        for paragraph in long_paragraphs(item["text"])
    }
    in_code = {
        paragraph
        for part in PARTS
        for item in lines["code", part]
        for string in strings(item["text"])
        for paragraph in long_paragraphs(string)
    }
    assert in_code
    assert documentation & in_code == set()


def test_shuffled_text_is_of_documents_that_no_other_source_holds(lines: Lines) -> None:
    prose = {item["id"].removeprefix("prose/") for part in PARTS for item in lines["prose", part]}
    bases = {
        part: {re.fullmatch(r"shuffled/(.*)#\d+", item["id"])[1] for item in lines["shuffled", part]}  # type: ignore[index]
        for part in PARTS
    }
    assert prose & set.union(*bases.values()) == set()
    assert sum(map(len, bases.values())) == len(set.union(*bases.values()))


def test_code_has_neither_comments_nor_docstrings(lines: Lines) -> None:
    for part in PARTS:
        for item in lines["code", part]:
            tokens = tokenize.generate_tokens(io.StringIO(item["text"]).readline)
            assert not any(token.type == tokenize.COMMENT for token in tokens)
            for node in ast.walk(ast.parse(item["text"])):
                is_string = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                assert not (is_string and isinstance(node.value.value, str))  # type: ignore[attr-defined]


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
        (["--output", "{tmp}/x", "--heldout-bytes", "0"], "error: --heldout-bytes 0 is less than 1"),
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
