"""Documents to Megatron's ``.bin``/``.idx``, byte for byte what Megatron-LM's tool writes.

One process reads and writes, ``--workers`` processes tokenize. Partitions, which are files in Megatron-LM, only decide
the order of the documents here: the documents are dealt out to the partitions one by one, and the partitions follow
each other, unless ``--keep-sequential-samples`` keeps the input's order.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megatron_dwm.atomic_write import atomic_files, sync
from megatron_dwm.config.flags import flag
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.corpora.readers import Reader, Record, input_files
from megatron_dwm.corpora.worker_pool import WorkerDied, WorkerPool
from megatron_dwm.data.tokenizers import build_tokenizer, end_of_document
from megatron_dwm.errors import UserError, shortened

logger = logging.getLogger(__name__)

_CHUNK = 32  # documents sent to a worker at a time


@dataclass(frozen=True)
class PreprocessConfig:
    """Preprocessing."""

    input: list[str] | None = flag(
        None, "JSON lines (plain, .gz or .zst) or Parquet: files, folders, or glob patterns, which are one input."
    )
    json_keys: list[str] = flag(["text"], "Keys (columns) to extract from each document; each becomes a data set.")
    split_sentences: bool = flag(
        False, "Split documents into sentences.", refused="documents are kept whole; leave the flag out"
    )
    keep_newlines: bool = flag(False, "Keep newlines when splitting sentences; otherwise without effect.")
    lang: str = flag("english", "Language of sentence splitting; otherwise without effect.")
    append_eod: bool = flag(False, "Append the end-of-document token to each document.")
    output_prefix: str | None = flag(None, "Path of the output without _<key>_document.bin/.idx.")
    workers: int = flag(1, "Number of processes that tokenize.")
    partitions: int = flag(1, "Deal the documents out to this many partitions, which follow each other.")
    log_interval: int = flag(1000, "Report progress after this many documents.")
    keep_sequential_samples: bool = flag(False, "Keep the documents' order with several partitions too.")
    padded_vocab_size: int | None = flag(
        None, "Size of the model's vocabulary.", refused="it has no effect on the data; leave it out"
    )
    skip_malformed: bool = flag(False, "Leave out and count malformed lines instead of stopping at one.")

    def __post_init__(self) -> None:
        for name, value in (("--input", self.input), ("--output-prefix", self.output_prefix)):
            if not value:
                raise UserError(f"{name} is missing; give a path")
        for name, number in (
            ("--workers", self.workers),
            ("--partitions", self.partitions),
            ("--log-interval", self.log_interval),
        ):
            if number < 1:
                raise UserError(f"{name} {number} is less than 1; give a positive number")
        if self.workers % self.partitions:
            raise UserError(
                f"--workers {self.workers} is not a multiple of --partitions {self.partitions}; change either"
            )


class Encoded(NamedTuple):
    """A document: of each key the token ids, in the data set's type, and the lengths of its sequences."""

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
    """Turns records into token ids."""

    def __init__(self, config: PreprocessConfig, tokenizer_config: TokenizerConfig) -> None:
        from megatron.core.datasets.indexed_dataset import DType

        self.keys = config.json_keys
        self.tokenizer = build_tokenizer(tokenizer_config)
        self.dtype = DType.optimal_dtype(self.tokenizer.vocab_size)
        self.end = end_of_document(self.tokenizer, tokenizer_config) if config.append_eod else None
        # No number is ever used, so none is converted: Python refuses integers of more than 4,300 digits.
        self._decoder = json.JSONDecoder(parse_int=lambda digits: None, parse_float=lambda digits: None)

    def __call__(self, record: Record) -> Encoded | Malformed:
        """Tokenize one record, or say what is wrong with it."""
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
            size = len(content.encode())
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
            tokens = [token for ids in sequences for token in ids]
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
    """Return why a tokenizer raised ``error``, whose message does not say that half a surrogate pair is the cause."""
    try:
        "".join(sentences).encode()
    except UnicodeEncodeError as cause:
        return cause
    return error


def preprocess(config: PreprocessConfig, tokenizer_config: TokenizerConfig) -> None:
    """Write ``<output_prefix>_<key>_document.bin`` and ``.idx`` of each key, in place of old ones.

    Raises:
        UserError: an unreadable input or tokenizer, a malformed record (unless skipped), or no documents.
    """
    encoder = Encoder(config, tokenizer_config)
    reader = Reader(input_files(config.input or []), config.json_keys)
    prefix = Path(config.output_prefix or "")
    try:
        with atomic_files(prefix.parent) as scratch:
            with ExitStack() as stack:
                results: Iterator[Encoded | Malformed]
                if config.workers == 1:
                    results = map(encoder, reader)
                else:
                    results = stack.enter_context(WorkerPool(encoder, config.workers)).map(_chunks(reader))
                _write(_reported(results, reader, config.log_interval), config, encoder.dtype, scratch / prefix.name)
            # New data beside an old index would be a dataset of wrong documents; data without an index is none.
            written = list(scratch.iterdir())
            for path in written:
                sync(path)
            for path in written:
                if path.suffix == ".idx":
                    (prefix.parent / path.name).unlink(missing_ok=True)
            sync(prefix.parent)
    except WorkerDied as error:
        raise UserError(
            f"--workers {config.workers}: a worker process ended ({error}); give fewer workers or more memory"
        ) from error
    except OSError as error:
        raise UserError(f"--output-prefix {prefix}: cannot be written ({error}); check the path") from error


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield the records in chunks for the workers."""
    iterator = iter(records)
    while chunk := list(itertools.islice(iterator, _CHUNK)):
        yield chunk


def _write(results: Iterable[Encoded | Malformed], config: PreprocessConfig, dtype: Any, prefix: Path) -> None:
    """Write the documents to ``<prefix>_<key>_document.bin`` and ``.idx`` of each key."""
    parts = 1 if config.keep_sequential_samples else config.partitions
    names = [f".part{part}" for part in range(parts)] if parts > 1 else [""]
    writers = [_Writer(config.json_keys, dtype, prefix, name) for name in names]
    skipped, first_skipped, documents = 0, "", 0
    for index, result in enumerate(results):
        if isinstance(result, Malformed):
            if not config.skip_malformed:
                raise UserError(f"--input {result}; mend it or give --skip-malformed")
            skipped, first_skipped = skipped + 1, first_skipped or str(result)
            continue
        documents += 1
        writers[index % parts].add(result)
    if skipped:
        logger.warning(f"{skipped} malformed documents are left out, the first: {first_skipped}")
    if documents == 0:
        raise UserError(f"--input {' '.join(config.input or [])}: no documents; give files that hold some")
    for writer in writers:
        writer.finish()
    if parts > 1:
        whole = _Writer(config.json_keys, dtype, prefix, "")
        for writer in writers:
            whole.append(writer)
        whole.finish()


class _Writer:
    """The data sets of all keys that documents are added to."""

    def __init__(self, keys: Iterable[str], dtype: Any, prefix: Path, name: str) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self._prefixes = {key: f"{prefix}_{key}_document{name}" for key in keys}
        self._builders = {
            key: IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype) for key, prefix in self._prefixes.items()
        }

    def add(self, document: Encoded) -> None:
        for key, builder in self._builders.items():
            builder.add_document(document.tokens[key], document.lengths[key])

    def append(self, finished: _Writer) -> None:
        """Append the documents of another writer, whose files are removed."""
        for key, builder in self._builders.items():
            builder.add_index(finished._prefixes[key])
            for suffix in (".bin", ".idx"):
                Path(finished._prefixes[key] + suffix).unlink()

    def finish(self) -> None:
        for key, builder in self._builders.items():
            builder.finalize(f"{self._prefixes[key]}.idx")


def _reported(
    results: Iterable[Encoded | Malformed], reader: Reader, log_interval: int
) -> Iterator[Encoded | Malformed]:
    """Yield the results, with a progress bar on a terminal and Megatron-LM's lines elsewhere."""
    is_terminal = sys.stderr.isatty()
    start, size = time.perf_counter(), 0
    with tqdm(total=reader.size, unit="B", unit_scale=True, disable=not is_terminal) as bar:
        for count, result in enumerate(results, start=1):
            size += result.size if isinstance(result, Encoded) else 0
            if is_terminal:
                bar.update(reader.position - bar.n)
                bar.set_postfix_str(f"{count} documents", refresh=False)
            elif count % log_interval == 0:
                elapsed = time.perf_counter() - start
                speed = f"{count / elapsed:.1f} docs/s, {size / elapsed / 2**20:.2f} MB/s"
                logger.info(f"Processed {count} documents ({speed}).")
            yield result
