"""The first pass of a selection: each task writes a table with three numbers per row."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megatron_dwm.analysis.importance import MAX_NGRAMS, ImportanceWeights, ngram_counts
from megatron_dwm.analysis.selection_flags import SelectConfig
from megatron_dwm.analysis.top_rows import ROW
from megatron_dwm.corpora.readers import Record
from megatron_dwm.corpora.storage import OutputFolder
from megatron_dwm.data.tokenizer_folder import load_tokenizer_folder
from megatron_dwm.errors import UserError, shortened
from megatron_dwm.json_lines import parse_object

_CHUNK = 1024  # rows that are read together
MAX_SOURCES = 1000
"""Limit of sources. With ``--method source-mix``, each of them costs four passes over the table (``top_rows.py``)."""
_MAX_TOKENS = 1 << 40  # of a row: sums stay within 64 bits


class TextExtractor(PipelineStep):  # type: ignore[misc]
    """Gives each document the text of its record."""

    type, name = "selection", "texts"

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents.

        Raises:
            UserError: a row has no text.
        """
        for document in data:
            record = document.metadata["record"]
            document.text = _text(record, _object(record), self.key)
            yield document


class NgramCounter(PipelineStep):  # type: ignore[misc]
    """Counts the n-grams of a task's texts, for DSIR."""

    type, name = "selection", "n-grams"

    def __init__(self, folder: OutputFolder, kind: str) -> None:
        """
        Args:
            folder: folder of the selection's work.
            kind: which texts are counted: all texts, or the target.
        """
        super().__init__()
        self.folder, self.kind = folder, kind

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        """Write the counts."""
        counts = ngram_counts((document.text for document in data), MAX_NGRAMS / world_size)
        with self.folder.open(f"{self.kind}/{rank:05d}") as file:
            file.write(counts.tobytes())


def importance_weights(folder: OutputFolder, tasks: int, target_tasks: int) -> ImportanceWeights:
    """Return the importance weights of texts from the counts of :class:`NgramCounter`.

    Raises:
        UserError: there are no words.
    """

    def total(kind: str, tasks: int) -> Any:
        return sum(np.frombuffer(folder.read_bytes(f"{kind}/{rank:05d}"), np.int64) for rank in range(tasks))

    return ImportanceWeights(total("ngrams", tasks), total("target", target_tasks))


class RowTableWriter(PipelineStep):  # type: ignore[misc]
    """Writes a table with the numbers of a task's rows, and the names of the sources, which are numbered in it."""

    type, name = "selection", "numbers"

    def __init__(self, config: SelectConfig, folder: OutputFolder, target_tasks: int) -> None:
        super().__init__()
        self.config, self.folder, self.target_tasks = config, folder, target_tasks

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        """Write the table.

        Raises:
            UserError: a row lacks what is needed, or there are too many sources.
        """
        config, sources = self.config, dict[str, int]()
        count_tokens = _TokenCounter(config.tokenizer, config.json_key) if config.tokenizer else None
        importance = importance_weights(self.folder, world_size, self.target_tasks) if config.method == "dsir" else None
        with self.folder.open(f"numbers/{rank:05d}") as file:
            while chunk := list(itertools.islice(data, _CHUNK)):
                records = [document.metadata["record"] for document in chunk]
                rows = list(map(_object, records))
                table = _numbers(config, records, rows, count_tokens, importance)
                for place, (document, row) in enumerate(zip(chunk, rows, strict=True)):
                    source = _source(document, row, config.source_key)
                    table["source"][place] = sources.setdefault(source, len(sources))
                if len(sources) > MAX_SOURCES:
                    raise too_many_sources(config)
                file.write(table.tobytes())
        self.folder.write(f"sources/{rank:05d}", json.dumps(list(sources)))


def too_many_sources(config: SelectConfig) -> UserError:
    """Return the error for more sources than :data:`MAX_SOURCES`."""
    return UserError(f"--source-key {config.source_key}: more than {MAX_SOURCES} sources; give a key with fewer values")


def _numbers(
    config: SelectConfig,
    records: Sequence[Record],
    rows: Sequence[dict[str, Any]],
    count_tokens: _TokenCounter | None,
    importance: ImportanceWeights | None,
) -> Any:
    """Return the table of some rows without their sources.

    Raises:
        UserError: a row lacks what is needed.
    """
    table, sign = np.zeros(len(rows), ROW), -1 if config.method == "perplexity" else 1
    pairs = list(zip(records, rows, strict=True))
    if importance:
        table["key"] = [importance(_text(record, row, config.json_key)) for record, row in pairs]
    elif key := config.ranking_key:
        table["key"] = [sign * _number(record, row, "--score-key", key) for record, row in pairs]
    if count_tokens:
        table["cost"] = count_tokens(records, rows)
    elif config.token_key:
        table["cost"] = [_tokens(record, row, config.token_key) for record, row in pairs]
    else:
        table["cost"] = 1
    return table


def _object(record: Record) -> dict[str, Any]:
    """Return the row that a record holds.

    Raises:
        UserError: it is not an object.
    """
    if not isinstance(record.content, str):
        return record.content
    try:
        record.content.encode()
        return parse_object(record.content)
    except ValueError as error:
        raise UserError(
            f"--input {record.place}: not a JSON object ({shortened(error)}); correct or remove it"
        ) from None


def _number(record: Record, row: dict[str, Any], name: str, key: str) -> float:
    """Return the number under a key.

    Raises:
        UserError: there is none.
    """
    value = row.get(key)
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and isfinite(value):
            return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        pass
    raise UserError(f"--input {record.place}: no number under {key!r}; correct the row, or give another {name}")


def _tokens(record: Record, row: dict[str, Any], key: str) -> int:
    """Return the number of tokens under a key.

    Raises:
        UserError: there is none.
    """
    value = _number(record, row, "--token-key", key)
    if not 0 <= value <= _MAX_TOKENS or value != int(value):
        raise UserError(f"--input {record.place}: {value} under {key!r} is not a number of tokens; correct the row")
    return int(value)


def _text(record: Record, row: dict[str, Any], key: str) -> str:
    """Return the text under a key.

    Raises:
        UserError: there is none.
    """
    text = row.get(key)
    try:
        if isinstance(text, str):
            text.encode()
            return text
    except UnicodeEncodeError:  # half of a surrogate pair, which is no text to a tokenizer
        pass
    raise UserError(f"--input {record.place}: no text under {key!r}; correct the row, or give another --json-key")


def _source(document: Document, row: dict[str, Any], key: str | None) -> str:
    """Return the name of a row's source.

    Raises:
        UserError: it has none.
    """
    source = document.metadata["path"] if key is None else row.get(key)
    if not isinstance(source, str):
        raise UserError(f"--input {document.id}: no text under {key!r}; correct the row, or give another --source-key")
    return source


class _TokenCounter:
    """Counts the tokens of rows' texts with the tokenizer of a Hugging Face folder."""

    def __init__(self, folder: str, text_key: str) -> None:
        self._key = text_key
        self._tokenizer = load_tokenizer_folder(folder, "--tokenizer")

    def __call__(self, records: Sequence[Record], rows: Sequence[dict[str, Any]]) -> list[int]:
        """Return the number of tokens of each row.

        Raises:
            UserError: a row has no text.
        """
        texts = [_text(record, row, self._key) for record, row in zip(records, rows, strict=True)]
        return list(map(len, self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]))
