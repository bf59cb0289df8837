"""What can be wrong with data, found before any process waits for another."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dwm.data.datasets import Blend, DataPaths
from megatron_dwm.errors import UserError

VOCABULARY_SAMPLE = 1_000_000  # tokens at the start of each file that are held against the vocabulary
SHORTEST_DOCUMENT = 32  # tokens; shorter documents are the same by chance
MOST_DOCUMENTS = 200_000  # documents of one dataset that are held against the target set


def check_data(paths: DataPaths, seq_length: int, vocab_size: int) -> None:
    """Check that the named datasets exist, are readable, fit the vocabulary and keep the target set apart.

    Raises:
        UserError: the first fault found.
    """
    for flag, (prefixes, _) in paths.blends().items():
        for prefix in prefixes:
            _check_dataset(flag, prefix, vocab_size)
    if paths.target is not None:
        tokens = sum(int(_document_lengths(prefix).sum()) for prefix in paths.target[0])
        if tokens < seq_length + 1:
            raise UserError(
                f"--dwm-valid-data-path {' '.join(paths.target[0])}: {tokens} tokens are less than one sample of "
                f"{seq_length + 1}; give a larger target set"
            )
        for flag, blend in paths.blends().items():
            if flag != "--dwm-valid-data-path":
                _check_apart(flag, blend, paths.target)


def _check_dataset(flag: str, prefix: str, vocab_size: int) -> None:
    for suffix in (".idx", ".bin"):
        if not Path(prefix + suffix).is_file():
            raise UserError(
                f"{flag} {prefix}: {prefix}{suffix} does not exist; give a prefix made by preprocess_data.py"
            )
    dataset = _open(prefix, flag)
    if len(dataset) == 0:
        raise UserError(f"{flag} {prefix}: holds no document; preprocess the data again")
    dtype = dataset.index.dtype
    expected = int(dataset.sequence_lengths.sum()) * np.dtype(dtype).itemsize
    actual = Path(prefix + ".bin").stat().st_size
    if actual < expected:
        raise UserError(
            f"{flag} {prefix}: {prefix}.bin has {actual} bytes where its index says {expected}; "
            "preprocess the data again"
        )
    leading = np.fromfile(prefix + ".bin", dtype=dtype, count=VOCABULARY_SAMPLE)
    if leading.size and int(leading.max()) >= vocab_size:
        raise UserError(
            f"{flag} {prefix}: token {int(leading.max())} is outside the tokenizer's vocabulary of {vocab_size}; use "
            "the tokenizer that the data was preprocessed with (--tokenizer-model, --vocab-size)"
        )


def _open(prefix: str, flag: str = "--data-path") -> Any:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        return IndexedDataset(prefix, mmap=True)
    except Exception as error:  # a damaged index fails in as many ways as there are damages
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{flag} {prefix}: {prefix}.idx is not an index ({reason}); preprocess the data again"
        ) from None


def _document_lengths(prefix: str) -> np.ndarray:
    # A copy: the index unmaps its memory when the dataset goes, whatever arrays still look into it.
    dataset = _open(prefix)
    return dataset.sequence_lengths.copy()


def _check_apart(flag: str, blend: Blend, target: Blend) -> None:
    """Refuse target documents that also stand in ``blend``: by file first, then by content."""
    target_files = {Path(prefix).resolve(): prefix for prefix in target[0]}
    for prefix in blend[0]:
        if Path(prefix).resolve() in target_files:
            raise UserError(
                f"--dwm-valid-data-path {prefix} is also named by {flag}; the target set must be apart from the data "
                "that is trained and evaluated on"
            )
    wanted: set[bytes] = set()
    for prefix in target[0]:
        wanted |= _digests(prefix, lengths=None)
    lengths = np.unique(np.concatenate([_document_lengths(prefix) for prefix in target[0]]))
    for prefix in blend[0]:
        shared = len(wanted & _digests(prefix, lengths))
        if shared:
            raise UserError(
                f"--dwm-valid-data-path {' '.join(target[0])}: {shared} of its documents also stand in {flag} "
                f"{prefix}; the target set must be apart from the data that is trained and evaluated on"
            )


def _digests(prefix: str, lengths: np.ndarray | None) -> set[bytes]:
    """Digests of a dataset's documents that are long enough to tell (and, if given, of one of ``lengths``).

    At most :data:`MOST_DOCUMENTS` of them, spread evenly: a corpus of terabytes is sampled, a small one read whole.
    """
    dataset = _open(prefix)
    candidates = dataset.sequence_lengths >= SHORTEST_DOCUMENT
    if lengths is not None:
        candidates &= np.isin(dataset.sequence_lengths, lengths)
    chosen = np.flatnonzero(candidates)
    if len(chosen) > MOST_DOCUMENTS:
        chosen = chosen[np.linspace(0, len(chosen) - 1, MOST_DOCUMENTS).astype(np.int64)]
    return {hashlib.blake2b(dataset[int(i)].astype(np.int64).tobytes(), digest_size=16).digest() for i in chosen}
