"""A run in fp16: outer updates that are skipped leave a record, and the logged norm is that of the parameters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.launch import records, succeed
from tests.e2e.test_uniform_weights import saved_tensors
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, WEIGHTING

RUN: dict[str, Any] = {
    **LANGUAGE_MODEL,
    **TRAINING,
    **DATA,
    **WEIGHTING,
    "--tensor-model-parallel-size": 2,
    "--fp16": True,
    "--initial-loss-scale": 2.0**20,
    "--hysteresis": 1,
    "--train-iters": 12,
    "--lr-warmup-iters": 0,
    "--dwm-warmup-iters": 0,
    "--dwm-update-interval": 1,
    "--dwm-num-stages": 1,
    "--log-params-norm": True,
    "--eval-iters": 0,
}


def test_skipped_updates_leave_a_record_and_the_norm_is_the_parameters(tmp_path: Path):
    save = tmp_path / "save"
    finished = succeed(tmp_path / "log", 2, RUN | {"--save": save})

    steps = records(save / "metrics.jsonl", "train")
    overflowed = [step["iteration"] for step in steps if step["skipped"]]
    skipped = records(save / "metrics.jsonl", "skipped_outer_update")
    of_steps = [record for record in skipped if record["reason"] == "the gradient of its step overflowed"]
    assert overflowed and [record["iteration"] for record in of_steps] == overflowed
    of_updates = [record for record in skipped if record not in of_steps]
    for record in of_updates:
        assert re.fullmatch(r"an alignment is not finite at loss scale \S+", record["reason"])
    made = [record["iteration"] for record in records(save / "metrics.jsonl", "outer_update")]
    assert made and sorted([*made, *(record["iteration"] for record in skipped)]) == list(range(1, 13))
    for record in skipped:
        line = f" > outer update of iteration {record['iteration']} skipped: {record['reason']}"
        assert record["stage"] == 1 and line in finished.output[0]

    tensors = saved_tensors(save / "iter_0000012")
    parameters = [
        value
        for name, value in tensors.items()
        if isinstance(value, torch.Tensor) and value.dtype == torch.float16 and not name.startswith("optimizer.")
    ]
    assert len(parameters) > 8
    expected = float(sum(value.double().square().sum() for value in parameters)) ** 0.5
    (line,) = [line for line in finished.output[1].splitlines() if re.search(r"iteration +12/", line)]
    assert float(line.split("params norm:")[1].split("|")[0]) == pytest.approx(expected, abs=6e-4)
