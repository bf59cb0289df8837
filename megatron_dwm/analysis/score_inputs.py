"""Inputs of scoring: parts of files and datasets, and the documents of a part."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.readers.base import BaseDiskReader

from megatron_dwm.corpora.parts import Part, divided, file_parts, records_of
from megatron_dwm.corpora.readers import input_files
from megatron_dwm.corpora.storage import absolute
from megatron_dwm.data.index_file import IndexFile
from megatron_dwm.data.validation import VOCABULARY_SAMPLE, check_dataset
from megatron_dwm.errors import UserError, shortened


def parts_of(patterns: Sequence[str], split_bytes: int) -> list[Part]:
    """Return the parts of all inputs, in their order.

    Args:
        patterns: files, folders and glob patterns, also by URLs, or prefixes of indexed datasets.
        split_bytes: size above which lines of JSON, and datasets, are divided.

    Raises:
        UserError: an input is missing or damaged.
    """
    parts: list[Part] = []
    for pattern in patterns:
        prefix = pattern.removesuffix(".idx").removesuffix(".bin")
        if os.path.isfile(f"{prefix}.idx") and os.path.isfile(f"{prefix}.bin"):
            index = check_dataset(f"--input {prefix}", prefix, None, sample=VOCABULARY_SAMPLE)
            bounds = divided(index.num_boundaries - 1, os.path.getsize(f"{prefix}.bin"), split_bytes)
            parts += [Part("dataset", os.path.abspath(prefix), *bound) for bound in bounds]
        else:
            parts += file_parts(list(map(absolute, input_files([pattern]))), split_bytes)
    return parts


class RowReader(BaseDiskReader):  # type: ignore[misc]
    """Reads the documents of one part, and stops at a malformed row.

    datatrove's readers leave out malformed lines, empty documents and the end of a damaged file with a warning. A
    document of a dataset has its token ids in the metadata, and its text is made of them later.
    """

    name = "rows"

    def __init__(self, parts: Sequence[Part], text_key: str, *, skip_malformed: bool, show_progress: bool) -> None:
        super().__init__("/", text_key=text_key, doc_progress=show_progress, add_file_path=False)
        self.parts, self.skip_malformed = list(parts), skip_malformed

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents of part number ``rank``."""
        yield from self.read_files_shard([str(rank)])

    def read_file(self, filepath: str) -> Iterator[Document]:
        """Yield the documents of a part.

        Raises:
            UserError: it cannot be read, or a row is no document and they are not skipped.
        """
        part = self.parts[int(filepath)]
        if part.kind == "dataset":
            yield from self._documents(part)
            return
        for record in records_of(part):
            try:
                row = (
                    json.loads(record.content, parse_constant=_refuse)
                    if isinstance(record.content, str)
                    else record.content
                )
                text = row[self.text_key]
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(f"no text under {self.text_key!r}")
                text.encode()
            except (ValueError, RecursionError, KeyError, TypeError) as error:
                reason = f"no key {error}" if isinstance(error, KeyError) else shortened(error)
                self._skip(record.place, reason, "correct it")
                continue
            yield Document(text=text, id=record.place, metadata={"row": row})

    def _documents(self, part: Part) -> Iterator[Document]:
        index = IndexFile.open(part.path)
        data = np.memmap(f"{part.path}.bin", index.dtype, mode="r")
        starts = index.places // index.dtype.itemsize
        boundaries, lengths = index.boundaries, index.lengths
        for number in range(part.start, part.end):
            first, last = int(boundaries[number]), int(boundaries[number + 1])
            place = f"{part.path}, document {number}"
            begin = int(starts[first]) if first < len(starts) else 0
            count = int(lengths[first:last].sum(dtype=np.int64))
            if not count:
                self._skip(place, "no tokens", "preprocess without it")
                continue
            ids = data[begin : begin + count].tolist()
            # The text must not be empty; it is made from the ids when their tokenizer has been loaded.
            yield Document(text=" ", id=place, metadata={"row": {"document": number}, "ids": ids})

    def _skip(self, place: str, reason: str, remedy: str) -> None:
        """Count a row that is not a document.

        Raises:
            UserError: such rows are not skipped.
        """
        if not self.skip_malformed:
            raise UserError(f"--input {place}: not a document ({reason}); {remedy}, or give --skip-malformed")
        self.stat_update("skipped")


def _refuse(word: str) -> None:
    """Refuse NaN and infinity, which Python reads as numbers and JSON does not allow."""
    raise ValueError(f"{word} is not JSON")
