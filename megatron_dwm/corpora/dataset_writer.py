"""Writing indexed datasets of encoded documents, which replace old ones when they are complete."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_dwm.atomic_write import atomic_files, sync
from megatron_dwm.corpora.encoder import Encoded


def dataset_prefix(prefix: Path | str, key: str) -> str:
    """Return the prefix of the dataset of a key, without suffix."""
    return f"{prefix}_{key}_document"


class DatasetWriter:
    """The datasets of all keys, to which documents are added."""

    def __init__(self, keys: Iterable[str], dtype: Any, prefix: Path) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self._prefixes = {key: dataset_prefix(prefix, key) for key in keys}
        self._builders = {
            key: IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype) for key, prefix in self._prefixes.items()
        }

    def add(self, document: Encoded) -> None:
        """Add a document."""
        for key, builder in self._builders.items():
            builder.add_document(document.tokens[key], document.lengths[key])

    def append(self, finished: Path) -> None:
        """Append the documents of another writer's finished files."""
        for key, builder in self._builders.items():
            builder.add_index(dataset_prefix(finished, key))

    def finish(self) -> None:
        """Write the indexes."""
        for key, builder in self._builders.items():
            builder.finalize(f"{self._prefixes[key]}.idx")


def publish_datasets(keys: Sequence[str], dtype: Any, parts: Sequence[Path], prefix: Path) -> None:
    """Concatenate finished parts, and replace old datasets by the result."""
    with atomic_files(prefix.parent) as scratch:
        if len(parts) == 1:
            for key, suffix in itertools.product(keys, (".bin", ".idx")):
                _link(dataset_prefix(parts[0], key) + suffix, dataset_prefix(scratch / prefix.name, key) + suffix)
        else:
            whole = DatasetWriter(keys, dtype, scratch / prefix.name)
            for part in parts:
                whole.append(part)
            whole.finish()
        # New data with an old index would be a dataset with wrong documents; data without an index is not a dataset.
        written = list(scratch.iterdir())
        for path in written:
            sync(path)
        for path in written:
            if path.suffix == ".idx":
                (prefix.parent / path.name).unlink(missing_ok=True)
        sync(prefix.parent)


def _link(finished: str, name: str) -> None:
    """Give a finished file a second name; it also keeps the first one, for a call after an interruption."""
    try:
        os.link(finished, name)
    except OSError:  # a file system without hard links
        shutil.copyfile(finished, name)
