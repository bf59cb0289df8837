"""Ranks that were started differently end before they train, and the flag is named."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_dwm.cli import pretrain as pretrain_command
from megatron_dwm.training import folder_lock
from tests.e2e.datasets import TOKENIZER, counting, make_dataset
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
        {"--train-iters": "9"},
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


@pytest.mark.parametrize(
    ("rank", "words", "message"),
    [
        (
            1,
            ["--help"],
            "the requested action is --help on rank 1 and a run on rank 0; start every rank with the",
        ),
        (
            0,
            ["--plan"],
            "the requested action is a run on rank 1 and --plan on rank 0; start every rank with the",
        ),
        (1, ["--nproc", "2"], "--nproc 2: a launcher has started 2 processes; leave it out"),
        (1, ["--nproc", "x"], "argument --nproc: invalid int value: 'x'"),
        (0, ["--plan-json", "plan.json"], "--plan-json"),
        (0, ["--version"], "unknown flag --version"),
    ],
)
def test_a_rank_that_is_asked_for_something_else_ends_all_at_once(
    rank: int, words: list[str], message: str, tmp_path: Path
):
    def main() -> None:
        if os.environ["RANK"] == str(rank):
            sys.argv += words
        pretrain_command.main()

    finished = pretrain(tmp_path / "log", 2, FLAGS, main=main)
    assert finished.codes == [2, 2], finished.text
    errors = "".join(finished.errors)
    assert errors.startswith(f"error: {message}") and errors.count("\n") == 1, finished.text


@pytest.mark.parametrize(("flag", "printed"), [("--help", "--dwm-mode"), ("--plan", "2 ranks = ")])
def test_what_is_printed_in_place_of_a_run_is_printed_once(flag: str, printed: str, tmp_path: Path):
    finished = pretrain(tmp_path / "log", 2, {**FLAGS, flag: True})
    assert finished.codes == [0, 0], finished.text
    assert printed in finished.output[0] and not finished.output[1] and not "".join(finished.errors), finished.text


def test_a_slow_rank_finds_the_first_one_still_there_after_a_plan(tmp_path: Path):
    def main() -> None:
        if os.environ["RANK"] == "1":
            check = dist.PrefixStore.check

            def slow_check(*arguments: Any) -> bool:
                time.sleep(1)
                return check(*arguments)

            dist.PrefixStore.check = slow_check  # type: ignore[assignment, method-assign]
        pretrain_command.main()

    finished = pretrain(tmp_path / "log", 2, {**FLAGS, "--plan": True}, main=main)
    assert finished.codes == [0, 0] and not "".join(finished.errors), finished.text


def test_a_plan_that_cannot_be_made_is_one_line_of_all_ranks(tmp_path: Path):
    finished = pretrain(tmp_path / "log", 2, {**FLAGS, "--plan": True, "--num-layers": 0})
    assert finished.codes == [2, 2], finished.text
    assert "".join(finished.errors).startswith("error: --num-layers 0") and "Traceback" not in finished.text


def elsewhere(folder: Path) -> Callable[[], None]:
    """The command whose rank 1 is started in another folder, to which the other's relative paths do not lead."""
    folder.mkdir()

    def main() -> None:
        folder_lock.VISIBLE_SECONDS = 0.0  # no other machine has to see anything here
        os.chdir(folder if os.environ["RANK"] == "1" else folder.parent)
        pretrain_command.main()

    return main


@pytest.mark.parametrize("layout", ["--pipeline-model-parallel-size", "--use-distributed-optimizer"])
def test_a_save_folder_that_the_ranks_do_not_share_is_refused(layout: str, tmp_path: Path):
    """Rank 1 would write its part of each checkpoint to a folder of its own: no checkpoint could be loaded."""
    flags = {**FLAGS, "--save": "save", layout: 2 if layout.endswith("size") else True}
    finished = pretrain(tmp_path / "log", 2, flags, main=elsewhere(tmp_path / "elsewhere"))
    assert finished.codes == [2, 2], finished.text
    (line,) = [line for line in "".join(finished.errors).splitlines() if line.startswith("error: ")]
    assert line.startswith("error: the run that holds --save save is nobody on rank 1 and process "), line
    assert line.endswith(" on rank 0; give the absolute path of a folder that all ranks share"), line


def test_data_that_a_rank_does_not_find_is_named(tmp_path: Path):
    make_dataset(tmp_path, "data", counting(1))
    data = {**TOKENIZER, "--data-path": "data_text_document", "--dwm-mode": "off", "--eval-iters": 0}
    flags = {**LANGUAGE_MODEL, **TRAINING, **data}
    finished = pretrain(tmp_path / "log", 2, flags, main=elsewhere(tmp_path / "elsewhere"))
    assert finished.codes == [2, 2], finished.text
    line = "error: --data-path data_text_document: data_text_document.idx does not exist on rank 1; give an absolute "
    assert f"{line}path that all ranks can read\n" in finished.text and "Traceback" not in finished.text, finished.text
