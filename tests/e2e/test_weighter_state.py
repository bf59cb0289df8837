"""The weighter's state is neither dropped nor made anew without a word, and its flags count on resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.launch import pretrain, records, succeed
from tests.fixtures.first_format import record as first_format
from tests.paths import FIXTURES

RUN: dict[str, Any] = {**first_format.MODEL, **first_format.TRAINING, **first_format.WEIGHTING, "--eval-iters": 0}
STOP = first_format.STOP


@pytest.fixture
def save(tmp_path: Path) -> Path:
    """The folder of a bilevel run that stopped in the middle of a stage."""
    shutil.unpack_archive(FIXTURES / "first_format" / "save.tar.xz", tmp_path / "save")
    return tmp_path / "save"


def weighter_state(save: Path, iteration: int) -> dict[str, Any]:
    return torch.load(save / f"iter_{iteration:07d}" / "dwm_state.pt", weights_only=True)


@pytest.mark.parametrize("mode", ["off", "frozen"])
def test_iterations_between_bilevel_ones_keep_the_weighter(mode: str, save: Path, tmp_path: Path):
    without = {name: value for name, value in RUN.items() if not name.startswith("--dwm")} | {"--dwm-mode": mode}
    if mode == "frozen":
        without |= {"--dwm-load": next((save / "weighter").iterdir()), "--dwm-score-cache": 5}
    place = {"--load": save, "--save": save}
    succeed(tmp_path / "log", 1, without | place | {"--exit-interval": STOP + 2})
    before, kept = weighter_state(save, STOP), weighter_state(save, STOP + 2)
    assert kept.keys() - {"score_cache"} == before.keys() and kept["outer_updates"] == before["outer_updates"] > 0
    if mode == "frozen":
        assert len(kept["score_cache"]["keys"]) == 5  # of two batches' samples
    assert all(torch.equal(kept["weighter"][key], value) for key, value in before["weighter"].items())
    finished = succeed(tmp_path / "log", 1, RUN | place)
    assert "holds no weighter" not in finished.text
    assert weighter_state(save, 12)["outer_updates"] > before["outer_updates"]


def test_a_missing_weighter_state_is_refused(save: Path, tmp_path: Path):
    (save / f"iter_{STOP:07d}" / "dwm_state.pt").unlink()
    finished = pretrain(tmp_path / "log", 1, RUN | {"--load": save})
    assert finished.codes == [2] and finished.errors[0].count("\n") == 1, finished.text
    assert "dwm_state.pt, the state of the weighting, is missing" in finished.errors[0]


def test_a_tokenizer_of_more_tokens_than_the_weighter_has_is_refused(save: Path, tmp_path: Path):
    """They fit the language model, whose rows are padded."""
    finished = pretrain(tmp_path / "log", 1, RUN | {"--load": save, "--vocab-size": 31})
    assert finished.codes == [2] and finished.errors[0].count("\n") == 1, finished.text
    assert "the checkpoint's weighter has 31 tokens and the tokenizer 32" in finished.errors[0]


def test_flags_that_count_on_resume_and_flags_that_do_not_are_said(save: Path, tmp_path: Path):
    changes = {"--dwm-lr": 0.5, "--dwm-weight-decay": 0.25, "--dwm-hidden-size": 64}
    changes |= {"--init-method-std": 0.5, "--seed": 7}
    finished = succeed(tmp_path / "log", 1, RUN | changes | {"--load": save, "--save": tmp_path / "changed"})
    (group,) = weighter_state(tmp_path / "changed", 12)["weighter_optimizer"]["param_groups"]
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)
    lines = (" > --dwm-lr 0.5 replaces the checkpoint's 0.01", " > --dwm-weight-decay 0.25 replaces the checkpoint's")
    lines += (" > --dwm-hidden-size 64 is for a new weighter: the checkpoint's, made with 8, is kept\n",)
    lines += (" > --init-method-std 0.5 is for a new model: the checkpoint's, made with 0.2, is kept\n",)
    lines += (" > --seed 7 is for a new random state: the checkpoint's, made with 1234, is kept\n",)
    for line in lines:
        assert line in finished.output[0], finished.text


def test_only_a_given_flag_is_said_to_have_no_effect(save: Path, tmp_path: Path):
    """A default may follow from others; where the flag is left out, nobody asked for another value."""
    folders = [save, *(tmp_path / name for name in ("left_out", "given", "left_out_again"))]
    said = []
    for number, flags in enumerate([{}, {"--dwm-ngram-buckets": 64}, {}]):
        place = {"--load": folders[number], "--save": folders[number + 1], "--exit-interval": STOP + 1 + number}
        finished = succeed(tmp_path / f"log{number}", 1, RUN | flags | place)
        said.append([line for line in finished.output[0].splitlines() if "--dwm-ngram-buckets" in line])
    line = " > --dwm-ngram-buckets 64 is for a new weighter: the checkpoint's, made with the default, is kept"
    assert said == [[], [line], []]


def test_a_step_with_a_learning_rate_of_zero_teaches_the_weighter_nothing(tmp_path: Path):
    save = tmp_path / "save"
    changes = {"--dwm-warmup-iters": 0, "--dwm-update-interval": 1, "--exit-interval": 2, "--save": save}
    finished = succeed(tmp_path / "log", 1, RUN | changes)
    (skipped,) = records(save / "metrics.jsonl", "skipped_outer_update")
    assert (skipped["iteration"], skipped["reason"]) == (1, "the learning rate of its step is 0")
    assert " > outer update of iteration 1 skipped: the learning rate of its step is 0" in finished.output[0]
    assert weighter_state(save, 2)["outer_updates"] == 1


def test_an_export_is_there_whenever_its_checkpoint_is(save: Path, tmp_path: Path):
    """It is written first, so that a kill between the two leaves no checkpoint without its export."""
    finished = succeed(tmp_path / "log", 1, RUN | {"--load": save, "--save": save, "--exit-interval": STOP + 2})
    lines = finished.output[0].splitlines()
    exported = next(n for n, line in enumerate(lines) if "exported the weighter" in line and "iter_0000008" in line)
    saving = next(n for n, line in enumerate(lines) if "saving checkpoint at iteration       8" in line)
    assert exported < saving
    assert {oct(path.stat().st_mode & 0o044) for path in (save / "weighter" / "iter_0000008").iterdir()} == {"0o44"}
