"""Merging of indexed datasets into one, with the same bytes as Megatron-LM's tool."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_dwm.atomic_write import atomic_files
from megatron_dwm.data.validation import VOCABULARY_SAMPLE, check_dataset
from megatron_dwm.errors import UserError

_SUFFIXES = (".bin", ".idx")


def dataset_prefixes(folder: str) -> list[str]:
    """Return the prefixes of the datasets in a folder, in the order of their names.

    Raises:
        UserError: there is no such folder, no dataset in it, or one without its data or index.
    """
    if not os.path.isdir(folder):
        raise UserError(f"--input {folder}: no such folder; give the folder of the datasets")
    names = [path for path in Path(folder).iterdir() if path.suffix in _SUFFIXES and path.is_file()]
    prefixes = sorted({str(path.with_suffix("")) for path in names})
    for prefix in prefixes:
        for suffix in _SUFFIXES:
            if not os.path.isfile(prefix + suffix):
                raise UserError(
                    f"--input {folder}: {prefix}{suffix} is missing; put it there, or remove the other file"
                )
    if not prefixes:
        raise UserError(f"--input {folder}: holds no datasets; give a folder with .bin and .idx files")
    return prefixes


def merge_datasets(prefixes: Sequence[str], output_prefix: str) -> tuple[int, int]:
    """Write one dataset with the documents of all.

    Returns:
        the numbers of documents and tokens.

    Raises:
        UserError: a dataset is damaged or has tokens of another type; the output is one of them, or cannot be written.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    indices = [check_dataset(f"--input {prefix}", prefix, None, sample=VOCABULARY_SAMPLE) for prefix in prefixes]
    for prefix, index in zip(prefixes, indices, strict=True):
        if index.dtype != indices[0].dtype:
            raise UserError(
                f"--input {prefix}: its tokens are {index.dtype}, those of {prefixes[0]} are {indices[0].dtype}; merge "
                "datasets of the same tokenizer"
            )
        if Path(prefix).resolve() == Path(output_prefix).resolve():
            raise UserError(f"--output-prefix {output_prefix} is one of the datasets; give another name")
    output = Path(output_prefix)
    size = sum(os.path.getsize(f"{prefix}.bin") for prefix in prefixes)
    try:
        with atomic_files(output.parent) as scratch:
            builder = IndexedDatasetBuilder(str(scratch / f"{output.name}.bin"), dtype=indices[0].dtype.type)
            with tqdm(desc="merging", total=size, unit="B", unit_scale=True, disable=None) as bar:
                for prefix in prefixes:
                    builder.add_index(prefix)
                    bar.update(os.path.getsize(f"{prefix}.bin"))
            builder.finalize(str(scratch / f"{output.name}.idx"))
            output.with_name(f"{output.name}.idx").unlink(missing_ok=True)  # new data with an old index is no dataset
    except OSError as error:
        raise UserError(f"--output-prefix {output}: cannot be written ({error.strerror}); check the path") from None
    return sum(index.num_boundaries - 1 for index in indices), size // indices[0].dtype.itemsize
