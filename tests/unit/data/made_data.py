"""Indexed datasets, written as Megatron-LM writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


def write_dataset(
    folder: Path, name: str, documents: Sequence[Sequence[int]], dtype: type[np.number] = np.uint16
) -> str:
    """Write documents of token ids; return their prefix."""
    prefix = str(folder / name)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document), [len(document)] if len(document) else [])
    builder.finalize(f"{prefix}.idx")
    return prefix
