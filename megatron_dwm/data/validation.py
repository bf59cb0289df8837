"""What can be wrong with data, found before any process waits for another."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from megatron_dwm.data.blend import SPLIT_NAMES, TARGET_FLAG, Blend, DataPaths, split_slices
from megatron_dwm.data.index_file import sequence_lengths
from megatron_dwm.errors import UserError

VOCABULARY_SAMPLE = 2**26  # tokens of each dataset that are held against the vocabulary,
VOCABULARY_PIECES = 64  # in so many pieces, if there are more
SHORTEST_DOCUMENT = 32  # tokens; shorter documents are the same by chance
MOST_DOCUMENTS = 200_000  # documents of one dataset that are held against the target set


def check_data(paths: DataPaths, seq_length: int, vocab_size: int) -> None:
    """Check that the named datasets exist, are readable, fit the vocabulary and keep the target set apart.

    Raises:
        UserError: the first fault found.
    """
    for flag, blend in paths.blends().items():
        for prefix in blend[0]:
            _check_dataset(flag, prefix, vocab_size)
        _check_parts(flag, blend, paths.split if blend is paths.shared else None, seq_length)
    if paths.target is not None:
        _check_target_size(paths.target, seq_length)
        for flag, blend in paths.blends().items():
            if flag != TARGET_FLAG:
                _check_apart(flag, blend, paths.target)


def _check_dataset(flag: str, prefix: str, vocab_size: int) -> None:
    for suffix in (".idx", ".bin"):
        if not Path(prefix + suffix).is_file():
            raise UserError(
                f"{flag} {prefix}: {prefix}{suffix} does not exist; give a prefix made by preprocess_data.py"
            )
    dtype, end = _check_index(flag, prefix)
    if end == 0:
        raise UserError(f"{flag} {prefix}: holds no token; preprocess the data again")
    actual = Path(prefix + ".bin").stat().st_size
    if actual < end:
        raise UserError(
            f"{flag} {prefix}: {prefix}.bin has {actual} bytes where its index says {end}; preprocess the data again"
        )
    outside = [token for token in _extreme_tokens(prefix, dtype) if not 0 <= token < vocab_size]
    if outside:
        raise UserError(
            f"{flag} {prefix}: token {outside[0]} is outside the tokenizer's vocabulary of {vocab_size}; use the "
            "tokenizer that the data was preprocessed with (--tokenizer-model, --vocab-size)"
        )


def _check_index(flag: str, prefix: str) -> tuple[type[np.number], int]:
    """The type of the tokens, and the byte of the .bin file at which the last of them ends."""
    # The index alone: an IndexedDataset that fails to open prints a traceback when it is collected.
    from megatron.core.datasets.indexed_dataset import _IndexReader

    try:
        index = _IndexReader(f"{prefix}.idx", multimodal=False)
        lengths, pointers = index.sequence_lengths, index.sequence_pointers
        if index.document_indices[-1] != len(lengths):
            raise ValueError("its documents end where its sequences do not")
        if len(lengths) == 0:
            return index.dtype, 0
        if lengths.min() < 0 or pointers.min() < 0:
            raise ValueError("a negative length or place")
        return index.dtype, int((pointers + lengths * np.int64(index.dtype_size)).max())
    except Exception as error:  # a damaged index fails in as many ways as there are damages
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{flag} {prefix}: {prefix}.idx is not an index ({reason}); preprocess the data again"
        ) from None


def _extreme_tokens(prefix: str, dtype: type[np.number]) -> tuple[int, int]:
    """The least and the largest token; of a dataset too large to read, of pieces spread evenly over it."""
    tokens = np.memmap(f"{prefix}.bin", dtype=dtype, mode="r")
    pieces: list[np.ndarray] = [tokens]
    if len(tokens) > VOCABULARY_SAMPLE:
        size = VOCABULARY_SAMPLE // VOCABULARY_PIECES
        starts = np.linspace(0, len(tokens) - size, VOCABULARY_PIECES).astype(np.int64)
        pieces = [tokens[start : start + size] for start in starts]
    return min(int(piece.min()) for piece in pieces), max(int(piece.max()) for piece in pieces)


def _check_parts(flag: str, blend: Blend, split: str | None, seq_length: int) -> None:
    """Refuse a dataset that has nothing to give to a part of a blend that other datasets give to.

    megatron-core would look for its samples without end. It takes one epoch of each dataset of an unweighted blend,
    which must fill a sample; it repeats those of a weighted one.
    """
    prefixes, weights = blend
    least = seq_length + 1 if len(prefixes) > 1 and weights is None else 1
    lengths = [sequence_lengths(prefix) for prefix in prefixes]
    parts = [split_slices(split, len(of_dataset)) if split else [slice(None)] for of_dataset in lengths]
    for number, slices in enumerate(zip(*parts, strict=True)):
        tokens = [int(of_dataset[part].sum()) for of_dataset, part in zip(lengths, slices, strict=True)]
        if max(tokens) == 0 or min(tokens) >= least:
            continue
        named = f"{flag} {prefixes[int(np.argmin(tokens))]}: "
        if split:
            named += f"the {SPLIT_NAMES[number]} part of --split {split} "
        remedy = "leave the dataset out or give more data" + (", or change --split" if split else "")
        raise UserError(
            f"{named}has {min(tokens)} tokens, fewer than the {least} that each dataset of a blend must give; {remedy}"
        )


def _check_target_size(target: Blend, seq_length: int) -> None:
    tokens = sum(int(sequence_lengths(prefix).sum()) for prefix in target[0])
    if tokens < seq_length + 1:
        raise UserError(
            f"{TARGET_FLAG} {' '.join(target[0])}: {tokens} tokens are less than one sample of "
            f"{seq_length + 1}; give a larger target set"
        )


def _check_apart(flag: str, blend: Blend, target: Blend) -> None:
    """Refuse target documents that also stand in ``blend``: by file first, then by content."""
    target_files = {Path(prefix).resolve(): prefix for prefix in target[0]}
    for prefix in blend[0]:
        if Path(prefix).resolve() in target_files:
            raise UserError(
                f"{TARGET_FLAG} {prefix} is also named by {flag}; the target set must be apart from the data "
                "that is trained and evaluated on"
            )
    wanted: set[bytes] = set()
    for prefix in target[0]:
        wanted |= _digests(prefix, lengths=None)
    lengths = np.unique(np.concatenate([sequence_lengths(prefix) for prefix in target[0]]))
    for prefix in blend[0]:
        shared = len(wanted & _digests(prefix, lengths))
        if shared:
            raise UserError(
                f"{TARGET_FLAG} {' '.join(target[0])}: {shared} of its documents also stand in {flag} "
                f"{prefix}; the target set must be apart from the data that is trained and evaluated on"
            )


def _digests(prefix: str, lengths: np.ndarray | None) -> set[bytes]:
    """Digests of a dataset's documents that are long enough to tell (and, if given, of one of ``lengths``).

    At most :data:`MOST_DOCUMENTS` of them, spread evenly: a corpus of terabytes is sampled, a small one read whole.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix, mmap=True)
    candidates = dataset.sequence_lengths >= SHORTEST_DOCUMENT
    if lengths is not None:
        candidates &= np.isin(dataset.sequence_lengths, lengths)
    chosen = np.flatnonzero(candidates)
    if len(chosen) > MOST_DOCUMENTS:
        chosen = chosen[np.linspace(0, len(chosen) - 1, MOST_DOCUMENTS).astype(np.int64)]
    return {hashlib.blake2b(dataset[int(i)].astype(np.int64).tobytes(), digest_size=16).digest() for i in chosen}
