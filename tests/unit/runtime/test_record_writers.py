"""The window of a log line, and records that a resumed run takes up."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dwm.errors import UserError
from megatron_dwm.runtime.record_writers import JsonLines, LogLine, LossWindow, validation_line

LINE = LogLine(
    iteration=100,
    train_iters=500,
    consumed_samples=25600,
    skipped_samples=0,
    seconds_per_iteration=1.23456,
    throughput=None,
    learning_rate=1.5e-4,
    global_batch_size=256,
    losses={"lm loss": 6.7890123},
    loss_scale=1.0,
    grad_norm=1.2345,
    num_zeros=None,
    params_norm=None,
    skipped_iterations=0,
    nan_iterations=0,
)


def test_the_line_ends_with_what_is_ours():
    plain = str(LINE).split("]", 1)[1]
    assert plain == (
        " iteration      100/     500 | consumed samples:        25600 | elapsed time per iteration (ms): 1234.6 | "
        "learning rate: 1.500000E-04 | global batch size:   256 | lm loss: 6.789012E+00 | loss scale: 1.0 | "
        "grad norm: 1.234 | number of skipped iterations:   0 | number of nan iterations:   0 |"
    )
    weighted = replace(LINE, extra={"dwm stage": 2, "dwm effective sample size": 0.87654})
    assert str(weighted).split("]", 1)[1] == plain + " dwm stage: 2 | dwm effective sample size: 0.8765 |"


def test_a_window_averages_the_steps_that_were_made():
    window = LossWindow()
    window.add({"lm loss": 4.0}, skipped=False)
    window.add({"lm loss": math.inf}, skipped=True)
    window.add({"lm loss": 9.0}, skipped=True)
    window.add({"lm loss": 2.0}, skipped=False)
    assert window.averages() == {"lm loss": 3.0}
    assert (window.iterations, window.skipped, window.nan) == (4, 2, 1)


def test_the_rule_is_as_long_as_the_line_and_one_more():
    rule, text, last = validation_line("iteration 7", 1.0).splitlines()
    assert rule == last == "-" * (len(text) + 1)
    assert "lm loss PPL: 2.718282E+00" in text


def test_a_perplexity_does_not_overflow():
    assert "lm loss value: 1.000000E+03 | lm loss PPL: 4.851652E+08" in validation_line("iteration 7", 1000.0)


def test_a_resumed_run_drops_the_records_that_it_writes_again(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, resumed_at=0)
    for iteration in range(1, 6):
        first.write({"kind": "train", "iteration": iteration})
    first.close()
    with path.open("a") as file:
        file.write('{"kind": "tra')  # an interrupted write
    again = JsonLines(path, resumed_at=3)
    again.write({"kind": "train", "iteration": 4})
    again.close()
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--metrics-jsonl .*file/metrics\.jsonl"):
        JsonLines(tmp_path / "file" / "metrics.jsonl", resumed_at=0)


def test_a_new_run_leaves_the_records_of_another_beside(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    for resumed_at, iteration in ((0, 1), (0, 2), (2, 3), (2, 4)):
        records = JsonLines(path, resumed_at)
        records.write({"iteration": iteration})
        records.close()
    assert path.read_text() == '{"iteration": 2}\n{"iteration": 4}\n'
    (kept,) = tmp_path.glob("metrics.until-*.jsonl")
    assert kept.read_text() == '{"iteration": 1}\n'
