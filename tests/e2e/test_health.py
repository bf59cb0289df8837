"""Runs whose weighting goes wrong say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.launch import DATA, LANGUAGE_MODEL, TRAINING, WEIGHTING, pretrain, records, succeed


@pytest.mark.parametrize(
    ("changes", "sign", "named"),
    [
        # The floor is what a batch of 8 has with any weights but uniform ones.
        ({"--dwm-min-effective-sample-size": 1.0}, "collapsed weights", "--dwm-min-effective-sample-size 1"),
        ({"--dwm-lr": 0}, "equal scores", "--dwm-lr"),
    ],
)
def test_a_sign_is_logged_and_recorded(changes: dict, sign: str, named: str, tmp_path: Path):
    metrics = tmp_path / "metrics.jsonl"
    flags = {**LANGUAGE_MODEL, **TRAINING, **DATA, **WEIGHTING, **changes, "--metrics-jsonl": metrics}
    finished = succeed(tmp_path / "log", 1, flags)
    signs = [record["sign"] for record in records(metrics, "health")]
    assert len(signs) > 5 and set(signs) == {sign}
    assert "WARNING at iteration" in finished.output[0] and named in finished.output[0]


def test_alignments_that_are_all_zero_end_the_run(tmp_path: Path):
    # All matrices are zero and stay so: every hidden state is zero, and with it every gradient.
    flags = {**LANGUAGE_MODEL, **TRAINING, **DATA, **WEIGHTING, "--lr": 0, "--init-method-std": 0}
    finished = pretrain(tmp_path / "log", 1, flags)
    assert finished.codes == [1] and "exactly zero" in finished.text
