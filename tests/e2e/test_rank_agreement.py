"""Ranks that were started differently end before they train, and the flag is named."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_dwm.cli import pretrain as pretrain_command
from tests.e2e.launch import pretrain
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, WEIGHTING

FLAGS = {**LANGUAGE_MODEL, **TRAINING, **DATA, **WEIGHTING}


@pytest.mark.parametrize(
    "changes",
    [
        {"--lr": "0.02"},
        {"--clip-grad": "0.5"},
        {"--dwm-temperature": "2.0"},
        {"--dwm-mode": "off"},
        {"--eval-interval": "7"},
        {"--seed": "5"},
        {"--train-iters": "19"},
    ],
)
def test_a_flag_that_differs_on_one_rank_is_named(changes: dict[str, str], tmp_path: Path):
    def main() -> None:
        if os.environ["RANK"] == "1":
            for flag, value in changes.items():
                sys.argv += [flag, value]
        pretrain_command.main()

    finished = pretrain(tmp_path / "log", 2, FLAGS, main=main)
    assert finished.codes == [2, 2], finished.text
    message = "".join(finished.errors)
    (flag,) = changes
    assert message.startswith(f"error: {flag} is ") and message.count("\n") == 1, finished.text
    assert "on rank 1" in message and "on rank 0" in message


def test_a_checkpoint_that_one_rank_does_not_see_is_named(tmp_path: Path):
    flags: dict[str, Any] = {**FLAGS, "--train-iters": 4, "--lr-warmup-iters": 0, "--dwm-mode": "off"}
    for name in list(flags):
        if name.startswith("--dwm-") and name != "--dwm-mode":
            del flags[name]
    assert pretrain(tmp_path / "log1", 1, {**flags, "--save": tmp_path / "save"}).codes == [0]

    def main() -> None:
        if os.environ["RANK"] == "1":
            sys.argv[sys.argv.index("--load") + 1] += "/elsewhere"
        pretrain_command.main()

    finished = pretrain(tmp_path / "log2", 2, {**flags, "--load": tmp_path / "save"}, main=main)
    assert finished.codes == [2, 2], finished.text
    assert "".join(finished.errors).startswith("error: --load "), finished.text
