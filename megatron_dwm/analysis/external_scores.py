"""Scores of a run's samples from other programs, such as quality classifiers: JSON lines with the sample's index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

from megatron_dwm.corpora.readers import Reader, input_files
from megatron_dwm.errors import UserError, renamed_flags, shortened
from megatron_dwm.json_lines import parse_object

_INDEX = "index"


@dataclass(frozen=True)
class ExternalScores:
    """Numbers by name and by the sample's place in the training dataset."""

    values: dict[str, dict[int, float]]
    places: dict[str, str]
    """The file that each name was first found in."""

    def columns(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the scores of samples [n] by name, NaN where there is none."""
        return {
            name: np.array([by_index.get(int(index), np.nan) for index in indices], dtype=float)
            for name, by_index in self.values.items()
        }


def read_scores(patterns: Sequence[str]) -> ExternalScores:
    """Read files of rows such as ``{"index": 17, "quality": 3.5}``; every number but the index is a score.

    Raises:
        UserError: a file cannot be read, or a row has no index, no score, or a sample has a score of a name twice.
    """
    values: dict[str, dict[int, float]] = {}
    places: dict[str, str] = {}
    with renamed_flags({"--input": "--scores"}):
        for record in Reader(input_files(patterns), None):
            row = _row(record.content, record.place)
            index = row.get(_INDEX)
            if isinstance(index, bool) or not isinstance(index, int):
                raise UserError(f"--input {record.place}: no integer under {_INDEX!r}; give the sample's index")
            numbers = {name: _number(value) for name, value in row.items() if name != _INDEX}
            if not any(value is not None for value in numbers.values()):
                raise UserError(f"--input {record.place}: no number beside {_INDEX!r}; give a score, or leave it out")
            for name, value in numbers.items():
                if value is None:  # a text, or another field that the rater has kept
                    continue
                if values.setdefault(name, {}).setdefault(index, value) != value:
                    raise UserError(f"--input {record.place}: another {name!r} of sample {index}; give one of each")
                places.setdefault(name, record.path)
    if not values:
        raise UserError(f"--scores {' '.join(patterns)}: no rows; give the scores of samples")
    return ExternalScores(values, places)


def _row(content: str | dict[str, object], place: str) -> dict[str, object]:
    """Return the row that a record holds.

    Raises:
        UserError: it is not an object.
    """
    if not isinstance(content, str):
        return content
    try:
        return parse_object(content)
    except ValueError as error:
        raise UserError(f"--input {place}: not a JSON object ({shortened(error)}); give JSON lines") from None


def _number(value: object) -> float | None:
    """Return a value as a number; None if it is not a finite number."""
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
            return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        pass
    return None
