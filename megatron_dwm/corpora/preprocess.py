"""JSON lines to Megatron's ``.bin``/``.idx``, byte for byte what Megatron-LM's tool writes.

One process reads and writes, ``--workers`` processes tokenize. Partitions, which are files in Megatron-LM,
only decide the order of the documents here: the lines are dealt out to the partitions one by one, and the
partitions follow each other, unless ``--keep-sequential-samples`` keeps the input's order.
"""

from __future__ import annotations

import glob
import gzip
import itertools
import json
import os
import sys
import tempfile
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from megatron_dwm.config.flags import flag
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.data.tokenizers import build_tokenizer, end_of_document
from megatron_dwm.errors import UserError

_CHUNK = 32  # lines sent to a worker at a time
_CHUNKS_AHEAD = 8  # chunks in flight for each worker, which bounds the memory


@dataclass(frozen=True)
class PreprocessConfig:
    """Preprocessing."""

    input: str | None = flag(None, "JSON-lines file, plain or .gz, or a glob pattern of such files.")
    json_keys: list[str] = flag(["text"], "Keys to extract from each line; each becomes a data set.")
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


class Line(NamedTuple):
    """One line of the input; bytes that are not UTF-8 are escaped as lone surrogates."""

    path: str
    number: int  # counted from 1
    text: str


class Encoded(NamedTuple):
    """A document: of each key the token ids, in the data set's type, and the lengths of its sequences."""

    tokens: dict[str, np.ndarray]
    lengths: dict[str, list[int]]
    size: int  # of the line, in bytes


class Malformed(NamedTuple):
    """A line that is no document."""

    line: Line
    reason: str

    def __str__(self) -> str:
        return f"{self.line.path}, line {self.line.number}: {self.reason}"


class Encoder:
    """Turns lines into token ids."""

    def __init__(self, config: PreprocessConfig, tokenizer_config: TokenizerConfig) -> None:
        from megatron.core.datasets.indexed_dataset import DType

        self.keys = config.json_keys
        self.tokenizer = build_tokenizer(tokenizer_config)
        self.dtype = DType.optimal_dtype(self.tokenizer.vocab_size)
        self.end = end_of_document(self.tokenizer, tokenizer_config) if config.append_eod else None

    def __call__(self, line: Line) -> Encoded | Malformed:
        try:
            size = len(line.text.encode())
        except UnicodeEncodeError:
            return Malformed(line, "not UTF-8")
        try:
            document = json.loads(line.text)
        except (json.JSONDecodeError, RecursionError) as error:
            return Malformed(line, f"not JSON ({error})")
        if not isinstance(document, dict):
            return Malformed(line, "not a JSON object")
        encoded = Encoded({}, {}, size)
        for key in self.keys:
            if key not in document:
                return Malformed(line, f"no key {key!r}")
            text = document[key]
            sentences = text if isinstance(text, list) else [text]
            if not all(isinstance(sentence, str) for sentence in sentences):
                return Malformed(line, f"the value of {key!r} is not a string")
            try:
                encoded.tokens[key], encoded.lengths[key] = self._tokenize(sentences)
            except (ValueError, TypeError, OverflowError, RuntimeError) as error:
                return Malformed(line, f"the value of {key!r} cannot be tokenized ({_cause(sentences, error)})")
        return encoded

    def _tokenize(self, sentences: list[str]) -> tuple[np.ndarray, list[int]]:
        """A document's ids, and the lengths of its non-empty sequences."""
        sequences = [ids for ids in map(self.tokenizer.tokenize, sentences) if len(ids) > 0]
        lengths = [len(ids) for ids in sequences]
        tokens = [token for ids in sequences for token in ids]
        if tokens and self.end is not None:
            tokens.append(self.end)
            lengths[-1] += 1
        return np.array(tokens, dtype=self.dtype), lengths


def _cause(sentences: list[str], error: Exception) -> Exception:
    """Why a tokenizer raised ``error``: its own words do not tell of half a surrogate pair."""
    try:
        "".join(sentences).encode()
    except UnicodeEncodeError as cause:
        return cause
    return error


def preprocess(config: PreprocessConfig, tokenizer_config: TokenizerConfig) -> None:
    """Write ``<output_prefix>_<key>_document.bin`` and ``.idx`` of each key, replacing old ones at the end.

    Raises:
        UserError: an unreadable input or tokenizer, a malformed line (unless skipped), or no documents.
    """
    encoder = Encoder(config, tokenizer_config)
    lines = read_lines(input_files(config.input or ""))
    prefix = Path(config.output_prefix or "")
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=prefix.parent, prefix=f".{prefix.name}-") as scratch:
            if config.workers == 1:
                results: Iterator[Encoded | Malformed] = map(encoder, lines)
            else:
                results = _encode_in_processes(lines, config, tokenizer_config)
            written = _write(results, config, encoder.dtype, Path(scratch))
            for path in written:
                os.replace(path, prefix.with_name(f"{prefix.name}_{path.name}"))
    except OSError as error:
        raise UserError(f"--output-prefix {prefix}: cannot be written ({error}); check the path") from error


def input_files(pattern: str) -> list[str]:
    """The file, or the files that match the pattern.

    Raises:
        UserError: there is none.
    """
    # In the file system's order, as Megatron-LM takes them: sorted, the same input would give other bytes.
    files = [pattern] if Path(pattern).is_file() else glob.glob(pattern)
    if not files:
        raise UserError(f"--input {pattern}: no such file; check the path or pattern")
    return files


def read_lines(paths: Iterable[str]) -> Iterator[Line]:
    """The lines of the files, which gzip has packed where their names end in ``.gz``.

    Raises:
        UserError: a file is unreadable.
    """
    for path in paths:
        number = 0
        try:
            with (gzip.open if path.endswith(".gz") else open)(
                path, "rt", encoding="utf-8", errors="surrogateescape"
            ) as file:
                for number, text in enumerate(file, start=1):
                    yield Line(path, number, text)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"--input {path}: unreadable after line {number} ({error}); check the file") from error


def _encode_in_processes(
    lines: Iterator[Line], config: PreprocessConfig, tokenizer_config: TokenizerConfig
) -> Iterator[Encoded | Malformed]:
    """Encode in ``config.workers`` processes; the results come in the order of the lines."""
    pending: deque[Future[list[Encoded | Malformed]]] = deque()
    with ProcessPoolExecutor(config.workers, initializer=_start, initargs=(config, tokenizer_config)) as pool:
        try:
            while chunk := list(itertools.islice(lines, _CHUNK)):
                pending.append(pool.submit(_encode, chunk))
                if len(pending) >= _CHUNKS_AHEAD * config.workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"--workers {config.workers}: a worker process died; give fewer workers or more memory"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_encoder: Encoder  # a worker process's own, set once: a pool has no other place to keep it between calls


def _start(config: PreprocessConfig, tokenizer_config: TokenizerConfig) -> None:
    global _encoder
    _encoder = Encoder(config, tokenizer_config)


def _encode(chunk: list[Line]) -> list[Encoded | Malformed]:
    return [_encoder(line) for line in chunk]


def _write(results: Iterator[Encoded | Malformed], config: PreprocessConfig, dtype: Any, folder: Path) -> list[Path]:
    """Write the documents to ``folder``; returns ``<key>_document.bin`` and ``.idx`` of each key, synced."""
    parts = 1 if config.keep_sequential_samples else config.partitions
    names = [f"part{part}_" for part in range(parts)] if parts > 1 else [""]
    writers = [_Writer(config.json_keys, dtype, folder, name) for name in names]
    skipped: list[Malformed] = []
    documents = 0
    for index, result in enumerate(_reported(results, config.log_interval)):
        if isinstance(result, Malformed):
            if not config.skip_malformed:
                raise UserError(f"--input {result}; mend it or give --skip-malformed")
            skipped.append(result)
            continue
        documents += 1
        writers[index % parts].add(result)
    if skipped:
        print(f"Skipped {len(skipped)} malformed lines, the first: {skipped[0]}.", file=sys.stderr)
    if documents == 0:
        raise UserError(f"--input {config.input}: no documents; give a file of JSON lines")
    for writer in writers:
        writer.finish()
    if parts > 1:
        whole = _Writer(config.json_keys, dtype, folder, "")
        for writer in writers:
            whole.append(writer)
        whole.finish()
        return whole.paths
    return writers[0].paths


class _Writer:
    """The data sets of all keys that documents are added to."""

    def __init__(self, keys: Iterable[str], dtype: Any, folder: Path, name: str) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self._prefixes = {key: folder / f"{name}{key}_document" for key in keys}
        self._builders = {
            key: IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype) for key, prefix in self._prefixes.items()
        }

    @property
    def paths(self) -> list[Path]:
        return [
            prefix.with_name(prefix.name + suffix) for prefix in self._prefixes.values() for suffix in (".bin", ".idx")
        ]

    def add(self, document: Encoded) -> None:
        for key, builder in self._builders.items():
            builder.add_document(document.tokens[key], document.lengths[key])

    def append(self, finished: _Writer) -> None:
        for key, builder in self._builders.items():
            builder.add_index(str(finished._prefixes[key]))

    def finish(self) -> None:
        for key, builder in self._builders.items():
            builder.finalize(f"{self._prefixes[key]}.idx")
        for path in self.paths:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _reported(results: Iterator[Encoded | Malformed], log_interval: int) -> Iterator[Encoded | Malformed]:
    """The results, with a progress bar on a terminal and Megatron-LM's lines elsewhere."""
    terminal = sys.stderr.isatty()
    start, size = time.perf_counter(), 0
    for count, result in enumerate(tqdm(results, unit=" documents", disable=not terminal), start=1):
        size += result.size if isinstance(result, Encoded) else 0
        if not terminal and count % log_interval == 0:
            elapsed = time.perf_counter() - start
            speed = f"{count / elapsed:.1f} docs/s, {size / elapsed / 2**20:.2f} MB/s"
            print(f"Processed {count} documents ({speed}).", file=sys.stderr, flush=True)
        yield result
