"""Flags that stand for others are named in messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_dwm.cli.launch import read_run_flags
from megatron_dwm.errors import UserError
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
