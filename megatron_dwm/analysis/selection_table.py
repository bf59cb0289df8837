"""The first pass of a selection: three numbers per row, in a table on disk."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from math import isfinite
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from megatron_dwm.analysis.importance import ImportanceWeights
from megatron_dwm.analysis.selection_flags import SelectConfig
from megatron_dwm.analysis.top_rows import ROW
from megatron_dwm.corpora.readers import Reader, Record, input_files
from megatron_dwm.errors import UserError, shortened
from megatron_dwm.json_lines import parse_object

_CHUNK = 1024  # rows that are read together
_MOST_SOURCES = 1000
_MOST_TOKENS = 1 << 40  # of a row: sums stay within 64 bits


def progressing_records(paths: Sequence[str], description: str) -> Iterator[Record]:
    """Yield the records of files, with a progress bar."""
    reader = Reader(paths, None)
    with tqdm(desc=description, total=reader.size, unit="B", unit_scale=True, disable=None) as bar:
        for number, record in enumerate(reader):
            if number % _CHUNK == 0:
                bar.update(reader.position - bar.n)
            yield record
        bar.update(reader.position - bar.n)


def texts_of(paths: Sequence[str], key: str, description: str) -> Iterator[str]:
    """Yield the texts of files, with a progress bar.

    Raises:
        UserError: a row has none.
    """
    for record in progressing_records(paths, description):
        yield _text(record, _object(record), key)


def write_table(config: SelectConfig, paths: Sequence[str], file: IO[bytes]) -> list[str]:
    """Write the table of all rows to a file; return the names of the sources.

    Raises:
        UserError: a row lacks what is needed, there are no rows, or too many sources.
    """
    count_tokens = _TokenCounter(config.tokenizer, config.json_key) if config.tokenizer else None
    records, sources = progressing_records(paths, "reading"), dict[str, int]()
    importance = _importance(config, paths) if config.method == "dsir" else None
    sign = -1 if config.method == "perplexity" else 1
    while chunk := list(itertools.islice(records, _CHUNK)):
        table, rows = np.zeros(len(chunk), ROW), list(map(_object, chunk))
        if importance:
            texts = [_text(record, row, config.json_key) for record, row in zip(chunk, rows, strict=True)]
            table["key"] = list(map(importance, texts))
        elif key := config.ranking_key:
            table["key"] = [
                sign * _number(record, row, "--score-key", key) for record, row in zip(chunk, rows, strict=True)
            ]
        if count_tokens:
            table["cost"] = count_tokens(chunk, rows)
        elif config.token_key:
            table["cost"] = [_tokens(record, row, config.token_key) for record, row in zip(chunk, rows, strict=True)]
        else:
            table["cost"] = 1
        for place, (record, row) in enumerate(zip(chunk, rows, strict=True)):
            table["source"][place] = sources.setdefault(_source(record, row, config.source_key), len(sources))
        if len(sources) > _MOST_SOURCES:
            raise UserError(
                f"--source-key {config.source_key}: more than {_MOST_SOURCES} sources; give a key with fewer values"
            )
        table.tofile(file)
    if not sources:
        raise UserError(f"--input {' '.join(paths)}: no rows; give files that hold some")
    file.flush()
    return list(sources)


def _object(record: Record) -> dict[str, Any]:
    """Return the row that a record holds.

    Raises:
        UserError: it is no object.
    """
    if not isinstance(record.content, str):
        return record.content
    try:
        record.content.encode()
        return parse_object(record.content)
    except ValueError as error:
        raise UserError(f"--input {record.place}: no row ({shortened(error)}); correct or remove it") from None


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
    if not 0 <= value <= _MOST_TOKENS or value != int(value):
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


def _importance(config: SelectConfig, paths: Sequence[str]) -> ImportanceWeights:
    """Return the importance weights of texts, estimated on the files."""

    def target_texts() -> Iterator[str]:
        try:
            yield from texts_of(input_files(config.target or []), config.json_key, "target")
        except UserError as error:
            raise UserError(str(error).replace("--input ", "--target ", 1)) from None

    return ImportanceWeights(texts_of(paths, config.json_key, "counting"), target_texts())


def _source(record: Record, row: dict[str, Any], key: str | None) -> str:
    """Return the name of a row's source.

    Raises:
        UserError: it has none.
    """
    source = record.path if key is None else row.get(key)
    if not isinstance(source, str):
        raise UserError(f"--input {record.place}: no text under {key!r}; correct the row, or give another --source-key")
    return source


class _TokenCounter:
    """Counts the tokens of rows' texts with the tokenizer of a Hugging Face folder."""

    def __init__(self, folder: str, text_key: str) -> None:
        from transformers import AutoTokenizer

        self._key = text_key
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever it likes
            raise UserError(
                f"--tokenizer {folder}: no tokenizer loads from it ({shortened(error)}); give a Hugging Face folder"
            ) from None

    def __call__(self, records: Sequence[Record], rows: Sequence[dict[str, Any]]) -> list[int]:
        """Return the number of tokens of each row.

        Raises:
            UserError: a row has no text.
        """
        texts = [_text(record, row, self._key) for record, row in zip(records, rows, strict=True)]
        return list(map(len, self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]))
