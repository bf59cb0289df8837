"""Scores that others have given: read, matched by the sample's index, refused where they are none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_dwm.analysis.external_scores import read_scores
from megatron_dwm.errors import UserError


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_number_but_the_index_is_a_score_and_files_add_up(tmp_path: Path):
    rows = [{"index": 3, "quality": 1.5, "text": "kept by the rater"}, {"index": 9, "quality": 2}]
    first = write(tmp_path / "a.jsonl", *rows)
    second = write(tmp_path / "b.jsonl", {"index": 3, "style": -1.0, "is_prose": True})
    found = read_scores([first, second])
    assert found.values == {"quality": {3: 1.5, 9: 2.0}, "style": {3: -1.0}}
    assert found.places == {"quality": first, "style": second}
    columns = found.columns(np.array([9, 3, 4]))
    assert columns["quality"].tolist()[:2] == [2.0, 1.5] and np.isnan(columns["quality"][2])
    assert np.isnan(columns["style"][[0, 2]]).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"quality": 1.0}], "line 1: no integer under 'index'"),
        ([{"index": 1.5, "quality": 1.0}], "line 1: no integer under 'index'"),
        ([{"index": 1, "text": "a"}], "line 1: no number beside 'index'"),
        ([{"index": 1, "q": 1.0}, {"index": 1, "q": 2.0}], "line 2: another 'q' of sample 1"),
        ([[1]], "line 1: not a JSON object"),
    ],
)
def test_a_row_that_is_no_score_is_named(rows: list[object], message: str, tmp_path: Path):
    file = write(tmp_path / "scores.jsonl", *rows)
    with pytest.raises(UserError) as refused:
        read_scores([file])
    assert str(refused.value).startswith(f"--scores {file}, {message}")


def test_a_file_without_rows_is_named(tmp_path: Path):
    file = write(tmp_path / "scores.jsonl")
    with pytest.raises(UserError, match=f"--scores {file}: no rows"):
        read_scores([file])


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match="--scores nowhere: no such file"):
        read_scores(["nowhere"])
