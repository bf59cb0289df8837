"""Checks of the data, made before any process waits for another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_dwm.data.blend import SPLIT_NAMES, TARGET_FLAG, Blend, DataPaths, split_slices
from megatron_dwm.data.index_file import IndexFile, sequence_lengths
from megatron_dwm.errors import UserError

VOCABULARY_SAMPLE = 2**26  # tokens of each dataset that a run compares with the vocabulary,
VOCABULARY_PIECES = 64  # in so many pieces spread over the dataset, if it has more
MIN_DOCUMENT_TOKENS = 32  # shorter documents may be equal by chance
MAX_DOCUMENTS = 200_000  # documents of one dataset that are compared with the target set
MASK_SAMPLES = 64  # samples of a dataset of which at least one must have a token whose loss counts
_PIECE = 2**24  # tokens that are read at a time


def check_data(
    paths: DataPaths, seq_length: int, vocab_size: int, *, has_evaluation: bool, should_read_whole_sets: bool = False
) -> None:
    """Check that the datasets exist, are intact, fit the vocabulary, and do not contain the target set.

    Args:
        has_evaluation: whether the run evaluates; otherwise the size of validation and test data does not matter.
        should_read_whole_sets: whether every sample of the validation data is read once in an evaluation.

    Raises:
        UserError: a check failed.
    """
    for flag, blend in paths.blends().items():
        for prefix in blend[0]:
            check_dataset(f"{flag} {prefix}", prefix, vocab_size, sample=VOCABULARY_SAMPLE)
        is_evaluation = flag in ("--valid-data-path", "--test-data-path")
        if has_evaluation or not is_evaluation:
            split = paths.split if blend is paths.shared else None
            num_read = len(SPLIT_NAMES) if has_evaluation else 1
            _check_parts(flag, blend, split, seq_length, num_read, should_read_whole_sets=should_read_whole_sets)
    if paths.target is not None:
        _check_target_size(paths.target, seq_length)
        for flag, blend in paths.blends().items():
            if flag != TARGET_FLAG:
                _check_target_is_separate(flag, blend, paths.target)


def check_files(paths: DataPaths, rank: int) -> None:
    """Check that a rank that reads data finds the datasets that the first rank has checked.

    Raises:
        UserError: a file is missing.
    """
    for flag, (prefixes, _) in paths.blends().items():
        for prefix in prefixes:
            remedy = f" on rank {rank}; give an absolute path that all ranks can read"
            _require_files(f"{flag} {prefix}", prefix, remedy)


def _require_files(name: str, prefix: str, remedy: str) -> None:
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(prefix + suffix):  # unlike pathlib's, false also for names that are too long
            raise UserError(f"{name}: {prefix}{suffix} does not exist{remedy}")


def check_dataset(
    name: str,
    prefix: str,
    vocab_size: int | None,
    *,
    sample: int | None = None,
    progress: Callable[[int], object] = lambda size: None,
) -> IndexFile:
    """Check both files of a dataset: the index in every entry, the tokens against the vocabulary.

    Args:
        name: how messages name the dataset.
        vocab_size: tokens must be below it; None to skip this check.
        sample: the maximum number of tokens to read, in evenly spread pieces; None for all.
        progress: called with the number of bytes read of either file since its last call.

    Raises:
        UserError: a file is missing or damaged, or a token is outside the vocabulary.
        OSError: a file cannot be read.
    """
    _require_files(name, prefix, "; give a prefix made by preprocess_data.py")
    try:
        index = IndexFile.open(prefix)
        expected = index.check(progress)
        actual = Path(prefix + ".bin").stat().st_size
    except ValueError as error:
        raise UserError(f"{name}: {prefix}.idx is not a valid index ({error}); preprocess the data again") from None
    if expected == 0:
        raise UserError(f"{name}: the dataset has no tokens; preprocess the data again")
    if actual != expected:
        raise UserError(
            f"{name}: {prefix}.bin has {actual} bytes where its index says {expected}, so that the two files are not "
            "of one dataset; preprocess the data again"
        )
    tokens = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r")
    for start, piece in _pieces(tokens, sample):
        extremes = (int(piece.min()), int(piece.max()))
        outside = [token for token in extremes if token < 0 or (vocab_size is not None and token >= vocab_size)]
        if outside:
            place = start + int(np.argmax(piece == outside[0]))
            problem = "negative" if vocab_size is None else f"outside the tokenizer's vocabulary of {vocab_size}"
            raise UserError(
                f"{name}: token {outside[0]} at place {place} is {problem}; use the tokenizer that the data was "
                "preprocessed with (--tokenizer-model, --vocab-size)"
            )
        progress(piece.nbytes)
    return index


def _pieces(tokens: npt.NDArray[Any], sample: int | None) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Yield the start and the tokens of pieces that cover the data, or of ``sample`` tokens spread evenly over it."""
    if sample is None or len(tokens) <= sample:
        for start in range(0, len(tokens), _PIECE):
            yield start, tokens[start : start + _PIECE]
    else:
        size = sample // VOCABULARY_PIECES
        for start in np.linspace(0, len(tokens) - size, VOCABULARY_PIECES).astype(np.int64).tolist():
            yield start, tokens[start : start + size]


def check_masks(name: str, dataset: Any) -> None:
    """Refuse a dataset without any token whose loss counts, because nothing would be learned from it.

    Reads :data:`MASK_SAMPLES` evenly spread samples.

    Args:
        name: how messages name the dataset.
        dataset: the samples; None is accepted.

    Raises:
        UserError: all tokens of these samples are masked.
    """
    if dataset is None or len(dataset) == 0:
        return
    chosen = np.unique(np.linspace(0, len(dataset) - 1, MASK_SAMPLES).astype(np.int64)).tolist()
    if not any(bool(dataset[index]["loss_mask"].any()) for index in chosen):
        raise UserError(
            f"the {name} data has no token whose loss counts in {len(chosen)} samples spread over it: all are pad or, "
            "with --eod-mask-loss, end-of-document tokens; give other data or leave --eod-mask-loss out"
        )


def _check_parts(
    flag: str, blend: Blend, split: str | None, seq_length: int, num_read: int, *, should_read_whole_sets: bool
) -> None:
    """Refuse a dataset that has no data for a split, if other datasets of the blend have some.

    megatron-core would search for its samples endlessly. It takes one epoch of each dataset of an unweighted blend,
    which must fill a sample; it repeats the datasets of a weighted one.

    Args:
        num_read: how many of the parts training, validation and test the run reads.
        should_read_whole_sets: whether one epoch of each dataset is read for validation.
    """
    prefixes, weights = blend
    is_epoch = len(prefixes) > 1 and weights is None
    lengths = [sequence_lengths(prefix) for prefix in prefixes]
    parts = [split_slices(split, len(of_dataset))[:num_read] if split else [slice(None)] for of_dataset in lengths]
    for number, slices in enumerate(zip(*parts, strict=True)):
        tokens = [int(of_dataset[part].sum()) for of_dataset, part in zip(lengths, slices, strict=True)]
        is_validation = number == 1 if split else flag == "--valid-data-path"
        least = seq_length + 1 if is_epoch or (should_read_whole_sets and is_validation) else 1
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


def _check_target_is_separate(flag: str, blend: Blend, target: Blend) -> None:
    """Refuse target documents that are also in ``blend``: compared by file first, then by content."""
    target_files = {Path(prefix).resolve(): prefix for prefix in target[0]}
    for prefix in blend[0]:
        if Path(prefix).resolve() in target_files:
            raise UserError(
                f"{TARGET_FLAG} {prefix} is also named by {flag}; the target set must be separate from the "
                "training and evaluation data"
            )
    wanted: set[bytes] = set()
    for prefix in target[0]:
        wanted |= _digests(prefix, lengths=None)
    lengths = np.unique(np.concatenate([sequence_lengths(prefix) for prefix in target[0]]))
    for prefix in blend[0]:
        common = len(wanted & _digests(prefix, lengths))
        if common:
            raise UserError(
                f"{TARGET_FLAG} {' '.join(target[0])}: {common} of its documents are also in {flag} "
                f"{prefix}; the target set must be separate from the training and evaluation data"
            )


def _digests(prefix: str, lengths: npt.NDArray[np.int32] | None) -> set[bytes]:
    """Return digests of a dataset's longer documents (and, if given, only of those with one of ``lengths``).

    At most :data:`MAX_DOCUMENTS` are read, evenly spread: a large corpus is sampled, a small one is read completely.
    """
    index = IndexFile.open(prefix)
    is_candidate = index.lengths >= MIN_DOCUMENT_TOKENS
    if lengths is not None:
        is_candidate &= np.isin(index.lengths, lengths)
    chosen = np.flatnonzero(is_candidate)
    if len(chosen) > MAX_DOCUMENTS:
        chosen = chosen[np.linspace(0, len(chosen) - 1, MAX_DOCUMENTS).astype(np.int64)]
    tokens = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r")
    starts, counts = index.places[chosen] // index.dtype.itemsize, index.lengths[chosen]
    return {
        hashlib.blake2b(tokens[start : start + count].astype(np.int64).tobytes(), digest_size=16).digest()
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True)
    }
