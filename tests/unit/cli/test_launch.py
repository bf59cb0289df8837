"""Flags that stand for others are named in messages; a run that fails leaves no process behind."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_dwm.cli.launch import _end_failed, read_run_flags
from megatron_dwm.errors import UserError
from tests.programs import Fork
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, as_argv


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"--load": "{tmp}/new", "--pretrained-checkpoint": "{tmp}/none"}, "--pretrained-checkpoint {tmp}/none: does"),
        (
            {"--load": "{tmp}/old", "--ckpt-convert-format": "torch", "--ckpt-convert-save": "{tmp}/file"},
            "--ckpt-convert-save {tmp}/file/old: cannot be written in {tmp}/file",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_with_the_flag_that_gave_it(
    flags: dict[str, Any], said: str, tmp_path: Path
):
    (tmp_path / "file").touch()
    given = {name: value.format(tmp=tmp_path) for name, value in flags.items()}
    with pytest.raises(UserError) as raised:
        read_run_flags(as_argv({**LANGUAGE_MODEL, **TRAINING, **DATA, **given}), 1)
    assert str(raised.value).startswith(said.format(tmp=tmp_path))


def test_a_run_that_fails_does_not_wait_for_its_writers(tmp_path: Path):
    """They would print a traceback of their own when the process is gone that takes their results."""

    def write_late() -> None:
        time.sleep(5)
        (tmp_path / "written").touch()

    def fail() -> None:
        multiprocessing.get_context("fork").Process(target=write_late).start()
        sync = SimpleNamespace(report_failure=lambda error: True, linger=lambda: None, world_size=1)
        _end_failed(UserError("a line"), cast(Any, sync))

    finished = Fork(fail).finish()
    assert (finished.returncode, finished.stderr) == (2, "error: a line\n")
    assert not (tmp_path / "written").exists()
