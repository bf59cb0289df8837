"""An iteration whose results cannot be right is named, and with --rerun-mode run again; a right one counts once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.launch import pretrain, records, succeed
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, WEIGHTING

RUN: dict[str, Any] = {**LANGUAGE_MODEL, **TRAINING, **DATA, **WEIGHTING, "--train-iters": 8}
PP2 = {"--pipeline-model-parallel-size": 2}
VALIDATED = {"--rerun-mode": "validate_results"}


def figures(path: Path) -> list[dict[str, Any]]:
    found = records(path, "train") + records(path, "outer_update")
    return [{key: value for key, value in record.items() if key != "seconds"} for record in found]


def test_results_that_are_right_change_nothing(tmp_path: Path):
    for mode in ("disabled", "validate_results"):
        flags = {**RUN, **PP2, "--rerun-mode": mode, "--metrics-jsonl": tmp_path / f"{mode}.jsonl"}
        succeed(tmp_path / mode, 2, flags)
    plain = figures(tmp_path / "disabled.jsonl")
    assert len(plain) > 8
    assert figures(tmp_path / "validate_results.jsonl") == plain


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            {"--lr": 1e30, "--clip-grad": 0},
            "is not finite, and the result was the same when the iteration was run again",
        ),
        (
            {"--lr": 1e30, "--clip-grad": 0, "--rerun-mode": "disabled"},
            "error: iteration 2: the gradient is not finite; lower --lr or look at the data of this step\n",
        ),
        (
            {"--error-injection-rate": 5},
            "the result was different when the iteration was run again; suspect the hardware",
        ),
    ],
    ids=["a learning rate that is too high", "the same, not run again", "an injected transient error"],
)
def test_what_cannot_be_right_is_said(flags: dict[str, Any], said: str, tmp_path: Path):
    finished = pretrain(tmp_path, 2, {**RUN, **PP2, **VALIDATED, "--lr-warmup-iters": 0, **flags})
    assert finished.codes == [2, 2], finished.text
    assert said in finished.text and finished.text.count("error: ") == 1
    assert "Traceback" not in finished.text
