"""Tasks for lm-evaluation-harness that are made from local text, without a network.

``local-cloze``: the last word of a passage, after the passage without it. ``local-continuation``: which of four
sentences comes next. ``local-title``: which of four sentences a title's text begins with. ``local-definition``: which
of four definitions is that of a word. Wrong answers are right answers to other items, of about the same length.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_dwm.corpora.corpus import CorpusConfig, Document, paragraphs
from megatron_dwm.corpora.documentation import find_package, texts
from megatron_dwm.corpora.readers import Reader
from megatron_dwm.corpora.standard_library import standard_library_corpus
from megatron_dwm.errors import UserError, renamed_flags

CHOICES = 4
MIN_ITEMS = 8
"""Minimum number of items of a task."""
FEWSHOT_ITEMS = 8
"""First items, used only as examples, so that the evaluated items are the same with and without examples."""

_QUOTES = "\u2018\u2019\u201c\u201d"  # typographic ones
_SENTENCE_END = re.compile(rf"(?<=[.!?])[\"')\]{_QUOTES}]*\s+(?=[\"'({_QUOTES}]?[A-Z])")
_DEFINITION = re.compile(r"^\s*[*-]?\s*(\w[\w .'()/-]{1,40}?)\s*(?::| --| \u2014| \u2013)\s+(\S.{19,})$", re.DOTALL)
_UNDERLINE = re.compile(r"^[=*~#^+-]{3,}$")
_NEAR = 200  # items with shorter answers, and with longer ones, that are considered for wrong answers
_SIMILAR = 24  # the nearest of them, from which wrong answers are drawn


@dataclass(frozen=True)
class Item:
    """A question, its answer, and its document."""

    query: str
    answer: str
    document: int


@dataclass(frozen=True)
class Passages:
    """The text from which tasks are made."""

    name: str
    """Its origin, for messages and records."""
    documents: list[Document]
    """A document's first paragraph may be its title."""


def read_passages(files: Sequence[str], packages: Sequence[str]) -> Passages:
    """Return the text of files or of installed packages; without either, the built-in corpus's held-out prose.

    Args:
        files: plain text, JSON lines (also compressed) or Parquet, with the keys ``text`` and perhaps ``title``.
        packages: the same values as for ``build-corpus --documentation``.

    Raises:
        UserError: a file or package is missing or cannot be read.
    """
    if not files and not packages:
        corpus = standard_library_corpus(CorpusConfig(output="."))
        return Passages("the held-out prose of the built-in corpus", corpus["prose"]["test"])
    documents = [document for path in files for document in _file_documents(path)]
    for spec in packages:
        documents += [Document(text, f"{spec}/{name}") for name, text in texts(find_package(spec)) if text]
    return Passages(" ".join([*files, *packages]), documents)


def _file_documents(path: str) -> list[Document]:
    if not Path(path).is_file():
        raise UserError(f"--task-text {path}: no such file; give a text file, JSON lines or Parquet")
    if path.endswith((".txt", ".md", ".rst")):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"--task-text {path}: not UTF-8 ({error.reason}); convert it") from None
        # One long text: its parts are documents of their own, so that wrong answers come from elsewhere in it.
        parts = paragraphs(text.replace("\r\n", "\n"))
        return [Document("\n\n".join(parts[start : start + 8]), f"{path}/{start}") for start in range(0, len(parts), 8)]
    with renamed_flags({"--input": "--task-text"}):
        rows = [_row(record.place, record.content) for record in Reader([path], None)]
    return [
        Document("\n\n".join(str(part) for part in (row.get("title"), row["text"]) if part), f"{path}/{number}")
        for number, row in enumerate(rows)
    ]


def _row(place: str, content: str | dict[str, Any]) -> dict[str, Any]:
    try:
        row = json.loads(content) if isinstance(content, str) else content
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise UserError(
            f'--input {place}: no JSON object with the key "text"; name another file, or a plain text that ends in .txt'
        )
    return row


def sentences(paragraph: str) -> list[str]:
    """Return the sentences of a paragraph, on one line each."""
    return _SENTENCE_END.split(" ".join(paragraph.split()))


def cloze_items(passages: Passages) -> Iterator[Item]:
    """Yield passages of up to three sentences without their last word, and that word."""
    for number, document in enumerate(passages.documents):
        for paragraph in paragraphs(document.text):
            passage = " ".join(sentences(paragraph)[:3])
            match = re.fullmatch(rf"(.+) ([A-Za-z]{{3,}})[.!?][\"'{_QUOTES}]?", passage)
            if match and 12 <= len(passage.split()) <= 80:
                yield Item(match[1], match[2], number)


def continuation_items(passages: Passages) -> Iterator[Item]:
    """Yield first sentences of paragraphs, and the sentence that follows."""
    for number, document in enumerate(passages.documents):
        for paragraph in paragraphs(document.text):
            found = sentences(paragraph)
            if len(found) >= 2 and all(5 <= len(sentence.split()) <= 40 for sentence in found[:2]):
                yield Item(found[0], found[1], number)


def title_items(passages: Passages) -> Iterator[Item]:
    """Yield headings, and the first sentence below them."""
    for number, document in enumerate(passages.documents):
        parts = paragraphs(document.text)
        for heading, below in pairwise(parts):
            lines = [line.strip("#=*~ ") for line in heading.splitlines() if not _UNDERLINE.match(line.strip())]
            first = sentences(below)[0]
            is_title = len(lines) == 1 and 1 <= len(lines[0].split()) <= 10 and lines[0][-1:].isalnum()
            if is_title and 5 <= len(first.split()) <= 40 and first[-1] in ".!?":
                yield Item(lines[0], first, number)


def definition_items(passages: Passages) -> Iterator[Item]:
    """Yield words and their definitions: lines such as ``word: what it means`` or ``word -- what it means``."""
    for number, document in enumerate(passages.documents):
        for paragraph in paragraphs(document.text):
            for line in paragraph.splitlines():
                match = _DEFINITION.match(line)
                if match and len(match[1].split()) <= 3 and 4 <= len(match[2].split()) <= 40:
                    yield Item(match[1], match[2].strip(), number)


@dataclass(frozen=True)
class _Kind:
    items: Callable[[Passages], Iterator[Item]]
    delimiter: str
    """Between the question and the answer."""
    has_choices: bool
    what: str
    """The items that are counted, for messages."""


_KINDS = {
    "local-cloze": _Kind(cloze_items, "", False, "passages that end in a word"),
    "local-continuation": _Kind(continuation_items, " ", True, "pairs of sentences"),
    "local-title": _Kind(title_items, "\n\n", True, "titles with a sentence below them"),
    "local-definition": _Kind(definition_items, ": ", True, "definitions"),
}
LOCAL_TASKS = tuple(_KINDS)


def require_local_names(names: Iterable[str]) -> None:
    """Refuse names that begin with ``local-`` and are not local tasks.

    Raises:
        UserError: there is such a name.
    """
    for name in names:
        if name.startswith("local-") and name not in LOCAL_TASKS:
            raise UserError(f"--tasks {name}: no such local task; give one of {', '.join(LOCAL_TASKS)}")


def local_task(name: str, passages: Passages, limit: int | None, seed: int) -> dict[str, Any]:
    """Return a task as lm-evaluation-harness takes it.

    Args:
        name: a name in :data:`LOCAL_TASKS`.
        passages: the text.
        limit: maximum number of items; None for all.
        seed: seed of the choice of items and wrong answers.

    Raises:
        UserError: the text has too few items.
    """
    kind, rng = _KINDS[name], random.Random(f"{name} {seed}")
    items = list({(item.query, item.answer): item for item in kind.items(passages)}.values())
    least = MIN_ITEMS + FEWSHOT_ITEMS
    if len(items) < least:
        raise UserError(
            f"--tasks {name}: {passages.name} has {len(items)} {kind.what}, and {least} are needed; name more or other "
            "text with --task-text"
        )
    order = rng.sample(items, len(items))
    counted = order[FEWSHOT_ITEMS:][:limit]
    wrong = _WrongAnswers(items, rng)
    rows = [wrong.row(item) if kind.has_choices else vars(item) for item in [*order[:FEWSHOT_ITEMS], *counted]]
    if kind.has_choices and min(len(row["choices"]) for row in rows) < CHOICES:
        raise UserError(
            f"--tasks {name}: {passages.name} has too few {kind.what} that differ in their answer; name more or other "
            "text with --task-text"
        )
    return {
        "task": name,
        "custom_dataset": lambda **_: _datasets(rows),
        "test_split": "test",
        "fewshot_split": "fewshot",
        "doc_to_text": "{{query}}",
        "target_delimiter": kind.delimiter,
        "metadata": {"version": 1.0},
        **(_MULTIPLE_CHOICE if kind.has_choices else _LOGLIKELIHOOD),
    }


_MULTIPLE_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "doc_to_target": "right",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
_LOGLIKELIHOOD = {
    "output_type": "loglikelihood",
    # The harness puts its delimiter before a target in examples only.
    "doc_to_target": "{{' ' + answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


class _WrongAnswers:
    """Right answers of other items, of about the same length, and of other documents where there are enough."""

    def __init__(self, items: Sequence[Item], rng: random.Random) -> None:
        self.by_length, self.rng = sorted(items, key=lambda item: len(item.answer)), rng
        self.place = {item: place for place, item in enumerate(self.by_length)}

    def row(self, item: Item) -> dict[str, Any]:
        """Return the question with its answer among wrong ones."""
        place = self.place[item]
        start = max(place - _NEAR, 0)
        near = [other for other in self.by_length[start : place + _NEAR] if other.answer != item.answer]
        near.sort(key=lambda other: abs(self.place[other] - place))
        elsewhere = {other.answer: None for other in near if other.document != item.document}
        candidates = list(elsewhere if len(elsewhere) >= CHOICES - 1 else {other.answer: None for other in near})
        choices = [item.answer, *self.rng.sample(candidates[:_SIMILAR], min(CHOICES - 1, len(candidates)))]
        self.rng.shuffle(choices)
        return {"query": item.query, "choices": choices, "right": choices.index(item.answer)}


def _datasets(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    rows = list(rows)
    return {"fewshot": Dataset.from_list(rows[:FEWSHOT_ITEMS]), "test": Dataset.from_list(rows[FEWSHOT_ITEMS:])}
