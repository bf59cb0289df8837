"""``--multiple-validation-sets`` and ``--full-validation``: one loss for each set, of each of its samples once.

That the losses are the same in every layout, ``test_layouts.py`` shows.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.e2e.datasets import TOKENIZER, counting, make_dataset, noise
from tests.e2e.launch import records, succeed
from tests.small_runs import LANGUAGE_MODEL, TRAINING

FLAGS = {
    **LANGUAGE_MODEL,
    **TRAINING,
    **TOKENIZER,
    "--dwm-mode": "off",
    "--train-iters": 2,
    "--lr-warmup-iters": 0,
    "--eval-interval": 1,
}


def test_each_set_has_a_loss_of_its_own(tmp_path: Path):
    counted = make_dataset(tmp_path, "counted", counting(1, documents=9, length=55))  # 531 tokens: 16 samples of 32
    noisy = make_dataset(tmp_path, "noisy", noise(2, documents=8))  # 12 samples: two batches, of which one is not full
    run = succeed(
        tmp_path / "log",
        1,
        {
            **FLAGS,
            "--train-data-path": make_dataset(tmp_path, "train", counting(0)),
            "--valid-data-path": [counted, noisy],
            "--test-data-path": counted,  # read as without the flags: by --eval-iters
            "--eval-iters": 2,
            "--train-iters": 3,
            "--start-eval-at-iter": 2,
            "--full-validation": True,
            "--multiple-validation-sets": True,
            "--tensorboard-dir": tmp_path / "board",
            "--metrics-jsonl": tmp_path / "metrics.jsonl",
            "--log-validation-ppl-to-tensorboard": True,
        },
    )
    *evaluations, last, test = records(tmp_path / "metrics.jsonl", "evaluation")
    assert [record["iteration"] for record in evaluations] == [2, 3] and test["split"] == "test"
    assert [list(record["lm_loss_by_source"]) for record in (*evaluations, last)] == [["counted", "noisy"]] * 3
    assert evaluations[1]["lm_loss_by_source"] == last["lm_loss_by_source"] != evaluations[0]["lm_loss_by_source"]
    assert last["lm_loss_by_source"]["counted"] == pytest.approx(test["lm_loss"], rel=1e-6)
    of_samples = 16 * last["lm_loss_by_source"]["counted"] + 12 * last["lm_loss_by_source"]["noisy"]
    assert last["lm_loss"] == pytest.approx(of_samples / 28, rel=1e-6)
    assert "lm_loss_by_source" not in test

    lines = [line for line in run.output[0].splitlines() if line.startswith(" validation")]
    for number, name in enumerate(("counted", "noisy")):
        value = evaluations[0]["lm_loss_by_source"][name]
        start = f" validation-{number} loss at iteration 2 | lm loss value: {value:.6E} | lm loss PPL: "
        assert lines[number].startswith(start) and lines[number].endswith(f" | dwm set: {name} | ")
    assert len(lines) == 7 and lines[-1].startswith(" validation loss at iteration 3 on test set | ")
    assert "Evaluating on 16 samples" in run.output[0]

    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    for name in ("lm loss validation-0", "dwm/validation_loss/counted"):
        values = [event.value for event in board.Scalars(name)]
        assert values == pytest.approx([record["lm_loss_by_source"]["counted"] for record in (*evaluations, last)])
    assert [event.step for event in board.Scalars("lm loss validation-1 vs samples")] == [16, 24, 24]
    assert len(board.Scalars("lm loss validation-1 ppl")) == 3


def test_sets_that_are_not_read_whole_go_on_where_the_last_evaluation_stopped(tmp_path: Path):
    data = [make_dataset(tmp_path, "counted", counting(1)), make_dataset(tmp_path, "noisy", noise(2))]
    flags = {**FLAGS, "--lr": 0, "--data-path": data, "--split": "1,1,0", "--multiple-validation-sets": True}
    succeed(tmp_path / "log", 1, {**flags, "--metrics-jsonl": tmp_path / "whole.jsonl"})
    whole = records(tmp_path / "whole.jsonl", "evaluation")
    assert [list(record["lm_loss_by_source"]) for record in whole] == [["counted", "noisy"]] * 3
    losses = [record["lm_loss_by_source"]["counted"] for record in whole]
    assert len(set(losses)) == 3  # of other samples each time: the model does not change

    stopped = {**flags, "--save": tmp_path / "run", "--load": tmp_path / "run"}
    succeed(tmp_path / "log", 1, {**stopped, "--exit-interval": 1})
    succeed(tmp_path / "log", 1, stopped)
    assert records(tmp_path / "run" / "metrics.jsonl", "evaluation") == whole
