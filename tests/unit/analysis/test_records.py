"""Records as files hold them: whole, half written, damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dwm.analysis.records import read_run
from megatron_dwm.errors import UserError

STEP = {"kind": "train", "iteration": 1, "lm_loss": 3.0, "stage": 0, "share_by_source": {"a": 1.0}}
SAMPLES = {"index": [4, 7], "source": ["a", "a"], "weight": [0.5, 1.5], "alignment": [None, 2.0]}
UPDATE = {"kind": "outer_update", "iteration": 1, "stage": 1, "target_loss": None, "samples": SAMPLES}
EVALUATION = {"kind": "evaluation", "iteration": 1, "split": "valid", "lm_loss": 2.0}


def write(folder: Path, *lines: str) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_records_are_read_by_kind_and_others_are_left_out(tmp_path: Path):
    other = {"kind": "skipped_outer_update", "iteration": 1}
    write(tmp_path, *map(json.dumps, (STEP, UPDATE, other, EVALUATION)))
    run = read_run(tmp_path)
    assert (run.steps, run.updates, run.evaluations) == ([STEP], [UPDATE], [EVALUATION])
    assert run.sources == ["a"] and run.evaluated("valid") == [EVALUATION] and run.evaluated("test") == []


def test_half_a_last_line_is_one_that_is_being_written(tmp_path: Path):
    path = write(tmp_path, json.dumps(STEP))
    path.write_text(path.read_text() + '{"kind": "tra')
    assert read_run(path).steps == [STEP]


def changed(record: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**record, **changes})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not a record"),
        ("[" * 100_000, "line 2: not a record"),
        ('{"kind": "train", "iteration": 1' + "0" * 5000 + "}", "line 2: not a record"),
        ("[1]", "line 2: not a record"),
        ('"train"', "line 2: not a record"),
        ("{}", "line 2: the record lacks 'kind'"),
        (changed(STEP, iteration="1"), "line 2: 'iteration' cannot be 1"),
        (changed(STEP, iteration=True), "line 2: 'iteration' cannot be True"),
        (changed(STEP, kind=["train"]), "line 2: 'kind' cannot be ['train']"),
        ('{"kind": "train", "iteration": 1}', "line 2: the record lacks 'lm_loss'"),
        (changed(STEP, share_by_source={"a": "much"}), "line 2: 'share_by_source' cannot be"),
        (changed(STEP, seconds=[1]), "line 2: 'seconds' cannot be [1]"),
        (changed(EVALUATION, split=3), "line 2: 'split' cannot be 3"),
        (changed(UPDATE, samples=[]), "line 2: 'samples' cannot be []"),
        (changed(UPDATE, samples={**SAMPLES, "weight": [1.0]}), "line 2: 'samples' cannot be"),
        (changed(UPDATE, samples={**SAMPLES, "source": ["a", 1]}), "line 2: 'samples' cannot be"),
        (changed(UPDATE, samples={**SAMPLES, "loss": ["high", "low"]}), "line 2: 'samples' cannot be"),
        (changed(UPDATE, samples={name: [] for name in SAMPLES}), "line 2: 'samples' cannot be"),
        (changed(UPDATE, samples={name: SAMPLES[name] for name in ("index", "weight")}), "line 2: 'samples' cannot be"),
    ],
)
def test_a_damaged_line_is_named(line: str, message: str, tmp_path: Path):
    path = write(tmp_path, json.dumps(STEP), line)
    with pytest.raises(UserError) as refused:
        read_run(tmp_path)
    assert str(refused.value).startswith(f"{path}, {message}") and len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe\n", "cannot be read"), (b"", "contains no training step"), (None, "no such file")],
)
def test_a_file_without_records_is_refused(content: bytes | None, message: str, tmp_path: Path):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_run(tmp_path)
