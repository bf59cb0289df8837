"""The datasets of a run: parsing of the flags that name them, as blends of dataset prefixes with weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dwm.config.data import DataConfig
from megatron_dwm.config.flags import flag_name
from megatron_dwm.errors import UserError, shortened
from megatron_dwm.special_files import read_text

Blend = tuple[list[str], list[float] | None]
"""Dataset prefixes and, if given, one weight for each."""

LEGACY_SPLIT = "969, 30, 1"  # Megatron-LM's default for --data-path without --split
SPLIT_NAMES = ("training", "validation", "test")
TARGET_FLAG = "--dwm-target-data-path"
_SPLIT = re.compile(r"""(['"]?)\s*(\d+\.?\d*|\.\d+)(\s*[,/ ]\s*(\d+\.?\d*|\.\d+)){0,2}\s*\1""")
"""The format that megatron-core parses. Quotes are part of it in Megatron-LM's own script for Llama."""


@dataclass(frozen=True)
class DataPaths:
    """The datasets of a run: one blend divided by ``split``, or one blend for each split."""

    shared: Blend | None
    per_split: tuple[Blend | None, Blend | None, Blend | None]
    target: Blend | None
    split: str | None
    validation_set_names: list[str] | None = None
    """Names of the datasets of the validation blend, if they differ from the names of the files."""

    def blends(self) -> dict[str, Blend]:
        """Return the blends that were given, by the flag that names each."""
        named = {
            "--data-path": self.shared,
            "--train-data-path": self.per_split[0],
            "--valid-data-path": self.per_split[1],
            "--test-data-path": self.per_split[2],
            TARGET_FLAG: self.target,
        }
        return {name: blend for name, blend in named.items() if blend is not None}

    @property
    def train(self) -> Blend | None:
        """The blend of the training data; None for mock data."""
        return self.shared or self.per_split[0]

    @property
    def valid(self) -> Blend | None:
        """The blend of the validation data; None for mock data, or without validation data."""
        return self.shared or self.per_split[1]

    @property
    def valid_sources(self) -> list[str]:
        """A short name for each dataset of the validation blend."""
        if self.validation_set_names is not None:
            return self.validation_set_names
        return ["mock"] if self.train is None else short_names(self.valid[0]) if self.valid is not None else []

    @property
    def train_sources(self) -> list[str]:
        """A short name for each dataset of the training blend, in the order of ``Batch.source``."""
        if self.train is None:
            return ["mock"]
        return short_names(self.train[0])


def short_names(prefixes: Sequence[str]) -> list[str]:
    """Return distinct short names of dataset prefixes: their file names, or whole prefixes if names repeat.

    The suffix that preprocessing adds is removed, and so is one that all names share, such as ``.train``. A prefix that
    is given again gets a number.
    """
    names = [Path(prefix).name.removesuffix("_document").removesuffix("_text") for prefix in prefixes]
    suffixes = {Path(name).suffix for name in names}
    if len(names) > 1 and len(suffixes) == 1:
        names = [name.removesuffix(*suffixes) for name in names]
    if len(set(names)) == len(names):
        return names
    before = [list(prefixes[:place]).count(prefix) for place, prefix in enumerate(prefixes)]
    return [f"{prefix} ({count + 1})" if count else prefix for prefix, count in zip(prefixes, before, strict=True)]


def data_paths(data: DataConfig, target: list[str] | None) -> DataPaths:
    """Read the flags that name datasets.

    Args:
        data: the data flags.
        target: the words of the flag that names the target set; None if the run needs no target set.

    Raises:
        UserError: a blend that is not ``prefix``, ``prefix prefix ...`` or ``weight prefix weight prefix ...``, a
            split that is not up to three numbers, an unreadable file of paths, or weights that have no effect.
    """
    words, split_words = data.data_path, [data.train_data_path, data.valid_data_path, data.test_data_path]
    if data.data_args_path is not None:
        words = _read("--data-args-path", data.data_args_path).split()
    if data.per_split_data_args_path is not None:
        split_words = _read_per_split(data.per_split_data_args_path)
    if data.split is not None and not (_SPLIT.fullmatch(data.split) and re.search("[1-9]", data.split)):
        raise UserError(f"--split {data.split}: not up to three numbers that are not all 0; give e.g. {LEGACY_SPLIT}")
    shared = parse_blend("--data-path", words) if words else None
    flags = ("--train-data-path", "--valid-data-path", "--test-data-path")
    train, valid, test = (
        parse_blend(flag, part) if part else None for flag, part in zip(flags, split_words, strict=True)
    )
    if shared is None and not data.mock_data and train is None:
        for name in ("data_args_path", "per_split_data_args_path"):
            if path := getattr(data, name):
                raise UserError(f"{flag_name(name)} {path}: names no training data; correct the file")
        raise UserError("--train-data-path is missing; evaluation data alone is not enough, give training data")
    if data.has_separate_validation_sets and valid is not None and valid[1] is not None:
        name = "--full-validation" if data.full_validation else "--multiple-validation-sets"
        raise UserError(
            f"--valid-data-path has weights, but {name} reads each dataset separately; leave the weights out"
        )
    blend, names = shared or valid, data.validation_set_names
    count = len(blend[0]) if blend is not None else 1
    if names is not None and len(names) != count:
        raise UserError(f"--validation-set-names {' '.join(names)}: give {count} names, one for each validation set")
    return DataPaths(
        shared=shared,
        per_split=(train, valid, test),
        target=parse_blend(TARGET_FLAG, target) if target else None,
        split=(data.split or LEGACY_SPLIT) if shared else None,
        validation_set_names=names,
    )


def parse_blend(flag: str, words: list[str]) -> Blend:
    """Parse ``prefix ...`` or ``weight prefix weight prefix ...``.

    Raises:
        UserError: weights and prefixes do not alternate, or a weight is not a positive number.
    """
    if len(words) == 1:
        return [words[0]], None
    weights = [weight for word in words[::2] if (weight := _number(word)) is not None]
    if len(words) == 2 * len(weights):
        for word, weight in zip(words[::2], weights, strict=True):
            if not 0 < weight < math.inf:
                raise UserError(f"{flag}: the weight {word} is not a positive number; give one, or drop its prefix")
        return [word.strip() for word in words[1::2]], weights
    if any(_number(word) is not None for word in words):
        raise UserError(
            f"{flag} {' '.join(words)}: weights and prefixes must alternate; give one weight for each prefix"
        )
    return [word.strip() for word in words], None


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _read(flag: str, path: str) -> str:
    try:
        return read_text(Path(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: cannot be read ({error}); check the path") from None


def _read_per_split(path: str) -> list[list[str] | None]:
    name = "--per-split-data-args-path"
    text = _read(name, path)
    keys = ("train", "valid", "test")
    try:
        listed = json.loads(text)
        if not isinstance(listed, dict):
            raise TypeError("it is not an object")
        for key, blend in listed.items():
            if key not in keys:
                raise TypeError(f"it has the unknown key {shortened(key)!r}")
            is_blend = isinstance(blend, list) and all(isinstance(word, (str, int, float)) for word in blend)
            if not is_blend and blend is not None:
                raise TypeError(f"{key!r} is not a list of weights and prefixes")
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f'{name} {path}: not a JSON object of lists "train", "valid" and "test" ({shortened(error)}); correct the '
            "file"
        ) from None
    return [[str(word) for word in listed[key]] if listed.get(key) is not None else None for key in keys]


def split_slices(split: str, num_sequences: int) -> list[slice]:
    """Return the slices of a dataset's sequences for training, validation and test, as in megatron-core."""
    from megatron.core.datasets import blended_megatron_dataset_config as core

    matrix = core.convert_split_vector_to_split_matrix(core.parse_and_normalize_split(split))
    return [
        slice(*(round(end * num_sequences) for end in ends)) if ends is not None else slice(0, 0) for ends in matrix
    ]
