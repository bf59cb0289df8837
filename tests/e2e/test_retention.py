"""A run killed while it puts a new checkpoint in place of an old one goes on, and leaves no checkpoint too many."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_dwm import atomic_write
from megatron_dwm.cli import pretrain as pretrain_command
from megatron_dwm.config.checkpoint import TRACKER
from megatron_dwm.training import checkpoint
from tests.e2e.launch import pretrain, succeed
from tests.e2e.test_uniform_weights import assert_same_checkpoints
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING

RUN: dict[str, Any] = {
    **LANGUAGE_MODEL,
    **TRAINING,
    **DATA,
    "--num-layers": 1,
    "--train-iters": 8,
    "--lr-warmup-iters": 1,
    "--save-interval": 2,
    "--save-retain-interval": 4,
    "--eval-iters": 0,
    "--dwm-mode": "off",
}
KILLED_AT = 4
PLACES = {
    # Of what puts iteration 4 in place of iteration 2, the call before which the run is killed; where it goes on.
    "before the old one is marked": (checkpoint, "retired_mark", 2),
    "before the new one is named": (atomic_write.os, "replace", 2),
    "before the old one is deleted": (checkpoint, "delete_retired", 4),
    "while the old one is deleted": (atomic_write.shutil, "rmtree", 4),
}


def killed_before(module: Any, name: str, save: Path) -> Callable[[], None]:
    """The command that is killed before this call, once the new checkpoint's folder is there."""

    def main() -> None:
        function = getattr(module, name)

        def dying(*args: Any, **kwargs: Any) -> Any:
            is_there = (save / f"iter_{KILLED_AT:07d}").is_dir()
            if is_there and (name != "rmtree" or list(save.glob(".iter_0000002.deleted"))):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        setattr(module, name, dying)
        pretrain_command.main()

    return main


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    succeed(folder / "log", 1, RUN | {"--save": folder / "save"})
    return folder / "save"


@pytest.mark.parametrize("place", PLACES)
def test_a_kill_while_a_checkpoint_is_replaced_leaves_none_too_many(place: str, whole: Path, tmp_path: Path):
    module, name, goes_on_from = PLACES[place]
    save = tmp_path / "save"
    flags = RUN | {"--save": save, "--load": save}
    killed = pretrain(tmp_path / "log", 1, flags, main=killed_before(module, name, save))
    assert killed.codes == [-signal.SIGKILL], killed.text
    assert (save / "iter_0000004").is_dir() and (save / ".lock").exists()

    resumed = succeed(tmp_path / "log", 1, flags)
    assert f"at iteration {goes_on_from}\n" in resumed.output[0]
    assert "killed" not in resumed.text and not resumed.errors[0]
    assert sorted(path.name for path in save.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000004", "iter_0000008"]
    assert_same_checkpoints(whole / "iter_0000008", save / "iter_0000008")


@pytest.mark.parametrize("saving", [{}, {"--async-save": True}], ids=["at once", "in the background"])
def test_a_kill_before_a_first_checkpoint_is_tracked_loses_nothing(saving: dict[str, Any], tmp_path: Path):
    save = tmp_path / "save"
    flags = RUN | saving | {"--save-interval": KILLED_AT, "--save-retain-interval": 8, "--save": save, "--load": save}
    killed = pretrain(tmp_path / "log", 1, flags, main=killed_before(atomic_write.os, "replace", save))
    assert killed.codes == [-signal.SIGKILL], killed.text
    assert not (save / TRACKER).exists()

    resumed = succeed(tmp_path / "log", 1, flags)
    assert (
        f" > {TRACKER} now names the checkpoint of an interrupted run: {save / 'iter_0000004'}\n" in resumed.output[0]
    )
    assert f"at iteration {KILLED_AT}\n" in resumed.output[0]
    assert sorted(path.name for path in save.glob("*iter_*")) == ["iter_0000008"]
