"""Tokenization of documents' records."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.corpora.readers import Record
from megatron_dwm.data.tokenizers import build_tokenizer, end_of_document
from megatron_dwm.errors import shortened


class Encoded(NamedTuple):
    """A document: for each key the token ids, in the dataset's type, and the lengths of its sequences."""

    tokens: dict[str, npt.NDArray[Any]]
    lengths: dict[str, list[int]]
    size: int  # of the document, in bytes


class Malformed(NamedTuple):
    """A record that is not a document."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class Encoder:
    """Converter of records to token ids."""

    def __init__(self, keys: Sequence[str], tokenizer_config: TokenizerConfig, *, append_eod: bool) -> None:
        """
        Args:
            keys: keys of a document's texts; each becomes a dataset.
            append_eod: whether the end-of-document token follows each document.

        Raises:
            UserError: a tokenizer that cannot be read, or has no such token.
        """
        from megatron.core.datasets.indexed_dataset import DType

        self.keys = keys
        self.tokenizer = build_tokenizer(tokenizer_config)
        self.dtype = DType.optimal_dtype(self.tokenizer.vocab_size)
        self.end = end_of_document(self.tokenizer, tokenizer_config) if append_eod else None
        # No number is ever used, so none is converted: Python refuses integers of more than 4,300 digits.
        self._decoder = json.JSONDecoder(parse_int=lambda digits: None, parse_float=lambda digits: None)

    def __call__(self, record: Record) -> Encoded | Malformed:
        """Tokenize one record, or return why it is malformed."""
        try:
            document, size = self._document(record.content)
            encoded = Encoded({}, {}, size)
            for key in self.keys:
                encoded.tokens[key], encoded.lengths[key] = self._tokenize(key, document)
        except _MalformedError as error:
            return Malformed(record.place, str(error))
        return encoded

    def _document(self, content: str | dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Return the object in a record, and its size in bytes."""
        if isinstance(content, dict):
            return content, sum(len(text.encode()) for text in content.values() if isinstance(text, str))
        try:
            size = len(content) if content.isascii() else len(content.encode())
        except UnicodeEncodeError:
            raise _MalformedError("not UTF-8") from None
        try:
            document = self._decoder.decode(content)
        except (ValueError, RecursionError) as error:
            raise _MalformedError(f"not JSON ({shortened(error)})") from None
        if not isinstance(document, dict):
            raise _MalformedError("not a JSON object")
        return document, size

    def _tokenize(self, key: str, document: dict[str, Any]) -> tuple[npt.NDArray[Any], list[int]]:
        """Return the ids of a document's text under ``key``, and the lengths of its non-empty sequences."""
        named = repr(shortened(key))
        if key not in document:
            raise _MalformedError(f"no key {named}")
        text = document[key]
        sentences = text if isinstance(text, list) else [text]
        if not all(isinstance(sentence, str) for sentence in sentences):
            raise _MalformedError(f"the value of {named} is not a string")
        try:
            sequences = [ids for ids in map(self.tokenizer.tokenize, sentences) if len(ids) > 0]
            lengths = [len(ids) for ids in sequences]
            tokens = list(itertools.chain.from_iterable(sequences))
            if tokens and self.end is not None:
                tokens.append(self.end)
                lengths[-1] += 1
            return np.array(tokens, dtype=self.dtype), lengths
        except Exception as error:  # tokenizers raise whatever their libraries raise
            reason = shortened(_cause(sentences, error))
            raise _MalformedError(f"the value of {named} cannot be tokenized ({reason})") from None


class _MalformedError(Exception):
    """A record that is not a document; the message says why."""


def _cause(sentences: list[str], error: Exception) -> Exception:
    """Return the cause of a tokenizer's ``error``, whose message does not mention half a surrogate pair in the text."""
    try:
        "".join(sentences).encode()
    except UnicodeEncodeError as cause:
        return cause
    return error
