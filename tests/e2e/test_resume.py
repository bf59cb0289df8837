"""A run that stops and resumes is the run that did not stop, bit for bit, weighter and its optimizer included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.e2e.launch import pretrain, records, succeed
from tests.e2e.test_uniform_weights import LAYOUTS, assert_same_checkpoints
from tests.fixtures.first_format import record as first_format
from tests.paths import FIXTURES
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, WEIGHTING

STAGES = {**WEIGHTING, "--dwm-stage-update-iters": 4}  # two stages of 4: iterations 3 to 6, 7 to 10


def assert_same(one: object, other: object, where: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor) and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert isinstance(other, dict) and one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert isinstance(other, (list, tuple)) and len(one) == len(other), where
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{number}]")
    else:
        assert one == other, where


@pytest.mark.parametrize(
    ("layout", "start", "stop"),
    [
        pytest.param("one process", "lm", 1, id="one process, in the warm-up"),
        pytest.param("one process", "modernbert", 5, id="one process, weighter of random weights"),
        pytest.param("one process", "ngram", 5, id="one process, n-gram weighter"),
        *(pytest.param(layout, "lm", 5, id=f"{layout}, in the middle of a stage") for layout in list(LAYOUTS)[1:]),
    ],
)
def test_a_resumed_run_equals_the_whole_one_bit_for_bit(layout: str, start: str, stop: int, tmp_path: Path):
    processes, parallel = LAYOUTS[layout]
    weighter = {"--dwm-init-from": "lm"} if start == "lm" else {"--dwm-init-from": "random", "--dwm-arch": start}
    flags = {**LANGUAGE_MODEL, **TRAINING, **DATA, **parallel, **STAGES, **weighter, "--eval-interval": 3}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeed(tmp_path / "log", processes, {**flags, "--save": whole})
    for extra in ({"--exit-interval": stop}, {"--load": parts}):
        succeed(tmp_path / "log", processes, {**flags, "--save": parts, **extra})

    for kind in ("train", "outer_update", "evaluation"):
        expected = records(whole / "metrics.jsonl", kind)
        found = records(parts / "metrics.jsonl", kind)
        timed = ("seconds", "elapsed")
        for record in (*expected, *found):
            for key in [key for key in record if any(word in key for word in timed)]:
                del record[key]
        assert len(expected) > 1 and found == expected
    assert_same_checkpoints(whole / "iter_0000010", parts / "iter_0000010")
    states = [torch.load(save / "iter_0000010" / "dwm_state.pt", weights_only=True) for save in (whole, parts)]
    assert states[0]["replay"] and bool(states[0]["weighter_optimizer"]["state"]) == (start != "ngram")
    assert_same(*states)


def test_the_models_flags_can_be_taken_from_the_checkpoint(tmp_path: Path):
    flags = {**LANGUAGE_MODEL, **TRAINING, **DATA, "--dwm-mode": "off", "--deterministic-mode": True}
    expected = records_of(tmp_path / "whole", flags | {"--save": tmp_path / "whole"})
    succeed(tmp_path / "log", 1, {**flags, "--save": tmp_path / "parts", "--exit-interval": 5})
    for name in LANGUAGE_MODEL:
        del flags[name]
    flags |= {"--load": tmp_path / "parts", "--save": tmp_path / "parts", "--use-checkpoint-args": True}
    assert records_of(tmp_path / "parts", flags) == expected
    missing = pretrain(tmp_path / "log", 1, {**flags, "--load": tmp_path / "nothing"})
    assert missing.codes == [2] and f"--load {tmp_path / 'nothing'}: does not exist" in missing.errors[0]


def records_of(save: Path, flags: dict[str, Any]) -> list[float]:
    succeed(save.parent / "log", 1, flags)
    return [record["lm_loss"] for record in records(save / "metrics.jsonl", "train")]


@pytest.mark.usefixtures("all_mock_data")
@pytest.mark.parametrize("run", ["resumed", "frozen"])
def test_a_checkpoint_and_an_export_of_the_first_format_still_load(run: str, tmp_path: Path):
    """Both were written before checkpoints had checksums; the run that resumes updates the weighter in its stage."""
    folder = FIXTURES / "first_format"
    shutil.unpack_archive(folder / "save.tar.xz", tmp_path / "save")
    weighter = tmp_path / "save" / "weighter" / f"iter_{first_format.STOP:07d}"
    bilevel = {**first_format.MODEL, **first_format.TRAINING, **first_format.WEIGHTING}
    flags = {"resumed": bilevel | {"--load": tmp_path / "save"}, "frozen": first_format.frozen(weighter)}
    succeed(tmp_path / "log", 1, flags[run] | {"--save": tmp_path / run})
    expected = json.loads((folder / "losses.json").read_text())[run]
    losses = first_format.losses(tmp_path / run)
    # The same processor gives the same bits; another one may round sums in another order. The weighter learns from
    # samples drawn at random from the replay, which it did not then: 4e-5 of the loss once it has learned twice.
    assert losses[:3] == pytest.approx(np.array(expected[:3]), rel=1e-5)
    assert losses == pytest.approx(np.array(expected), rel=1e-5 if run == "frozen" else 2e-4)
