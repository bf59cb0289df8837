"""The quickstart, as a newcomer runs it, with fewer iterations; and the built-in corpus, which it makes."""

from __future__ import annotations

import ast
import io
import json
import math
import os
import re
import subprocess
import tokenize
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megatron_dwm.analysis.records import read_run
from megatron_dwm.corpora.corpus import PARTS
from tests.paths import ROOT
from tests.unit.corpora.test_standard_library import Lines, long_paragraphs

ITERATIONS = 12
SOURCES = ("prose", "code", "comments", "shuffled")
TEXTS = ("prose", "comments", "shuffled")


def quickstart(folder: Path, commands: Path) -> str:
    """Run the script, with its ranks in forks of the tests, and return what it printed."""
    torchrun = f'() {{ "{commands}/torchrun" "$@"\n}}'  # a function of bash goes before a command of the environment
    environment = {**os.environ, "ITERATIONS": str(ITERATIONS), "BASH_FUNC_torchrun%%": torchrun}
    command = ["bash", str(ROOT / "examples" / "quickstart.sh"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "docstrings" not in done.stderr  # progress, which is for terminals
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, preloaded_commands: Path) -> tuple[Path, str]:
    """The folder of a run, and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "quickstart"
    return folder, quickstart(folder, preloaded_commands)


def test_the_quickstart_trains_learns_whom_to_trust_and_is_not_redone(
    finished: tuple[Path, str], preloaded_commands: Path
):
    folder, output = finished
    name = f"iter_{ITERATIONS:07d}"
    for made in (f"checkpoints/{name}", f"checkpoints/weighter/{name}", "checkpoints/metrics.jsonl", "run.png"):
        assert (folder / made).exists() and str(folder / made) in output, made
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")

    run = read_run(folder / "checkpoints")
    assert len(run.steps) == ITERATIONS and set(run.sources) == {"prose", "code", "comments", "shuffled"}
    valid = [record["lm_loss"] for record in run.evaluated("valid")]
    assert valid[-1] < math.log(1024) - 1  # the loss of guessing among the vocabulary is its logarithm
    last = [step["weight_by_source"] for step in run.steps[-ITERATIONS // 4 :]]
    mean = {source: sum(weights[source] for weights in last) / len(last) for source in ("prose", "shuffled")}
    assert mean["shuffled"] < mean["prose"], mean

    weighter = folder / "checkpoints" / "weighter" / name
    model = AutoModelForSequenceClassification.from_pretrained(weighter)
    ids = AutoTokenizer.from_pretrained(weighter)("The quick brown fox", return_tensors="pt").input_ids
    assert model(input_ids=ids).logits.shape == torch.Size([1, 1])

    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "run.png"}
    assert quickstart(folder, preloaded_commands).count("already done") == 5
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


@pytest.fixture(scope="module")
def lines(finished: tuple[Path, str]) -> Lines:
    return {
        (source, part): [json.loads(line) for line in (finished[0] / f"corpus/{source}.{part}.jsonl").open("rb")]
        for source in SOURCES
        for part in PARTS
    }


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


def test_files_are_exactly_the_sources_and_parts(finished: tuple[Path, str]) -> None:
    assert sorted(path.name for path in (finished[0] / "corpus").iterdir()) == sorted(
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


def test_the_table_tells_documents_and_bytes(finished: tuple[Path, str], lines: Lines) -> None:
    rows = {source: row.replace(",", "").split() for source, row in re.findall(r"(?m)^(\w+) (.*\d)$", finished[1])}
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
