"""What goes wrong around a run's checkpoints is said in one line, and loses nothing."""

from __future__ import annotations

import fcntl
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_dwm.cli import pretrain as pretrain_command
from tests.e2e.launch import assert_one_line, pretrain, records, succeed
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING

TP2 = {"--tensor-model-parallel-size": 2}
RUN: dict[str, Any] = {
    **LANGUAGE_MODEL,
    **TRAINING,
    **DATA,
    "--num-layers": 1,
    "--train-iters": 4,
    "--lr-warmup-iters": 1,
    "--save-interval": 2,
    "--eval-iters": 0,
    "--hidden-dropout": 0,
    "--attention-dropout": 0,
    "--dwm-mode": "off",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that saved at iterations 2 and 4."""
    folder = tmp_path_factory.mktemp("written")
    succeed(folder / "log", 1, RUN | {"--save": folder / "save"})
    return folder / "save"


NOTHING: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a missing folder": ({"--load": "{tmp}/nothing"}, ["--load {tmp}/nothing: does not exist"]),
    "a file": ({"--load": "{written}/metrics.jsonl"}, ["metrics.jsonl: is a file"]),
    "one checkpoint": (
        {"--load": "{written}/iter_0000002"},
        ["iter_0000002: is one checkpoint; give the folder that it is in, {written}, and --ckpt-step 2"],
    ),
    "an empty folder": ({"--load": "{tmp}"}, ["no latest_checkpointed_iteration.txt there"]),
    "step 0": (
        {"--load": "{written}", "--ckpt-step": 0},
        ["iter_0000000 does not exist; give --ckpt-step of one that is there (2, 4)"],
    ),
    "fine-tuning of nothing": (
        {"--load": "{tmp}/save", "--save": "{tmp}/save", "--finetune": True},
        ["--load {tmp}/save: does not exist"],
    ),
    "no place for a checkpoint": ({"--save": "/proc/nothing"}, ["--save /proc/nothing: cannot be written in /proc"]),
    "no place for TensorBoard": (
        {"--tensorboard-dir": "{written}/metrics.jsonl/x"},
        ["--tensorboard-dir", "cannot be written", "Not a directory"],
    ),
    "no place for records": ({"--metrics-jsonl": "/proc/x/metrics.jsonl"}, ["--metrics-jsonl", "cannot be written"]),
    "no place for an index cache": ({"--data-cache-path": "/proc/x"}, ["--data-cache-path /proc/x"]),
    "another learning rate": ({"--load": "{written}", "--lr": 0.5}, ["--lr 0.5 is not what", "--override-opt-param"]),
    "another optimizer": ({"--load": "{written}", "--optimizer": "sgd"}, ["--optimizer sgd cannot use", "adam"]),
    "another batch size": ({"--load": "{written}", "--global-batch-size": 16}, ["--global-batch-size 16 is not what"]),
    "the distributed optimizer of SGD": (
        {"--optimizer": "sgd", "--use-distributed-optimizer": True},
        ["--use-distributed-optimizer", "--optimizer sgd"],
    ),
}


@pytest.mark.parametrize("case", NOTHING)
def test_what_cannot_be_is_one_line_and_writes_nothing(case: str, written: Path, tmp_path: Path):
    changes, expected = NOTHING[case]

    def filled(value: Any) -> Any:
        return (
            value.replace("{tmp}", str(tmp_path)).replace("{written}", str(written))
            if isinstance(value, str)
            else value
        )

    flags = RUN | {"--save": tmp_path / "save"} | {name: filled(value) for name, value in changes.items()}
    before = sorted(written.rglob("*"))
    finished = pretrain(tmp_path / "log", 1, flags)
    assert_one_line(finished, *map(filled, expected))
    assert [path.name for path in tmp_path.iterdir()] == ["log"] and sorted(written.rglob("*")) == before


def test_a_folder_of_checkpoints_without_a_tracker_is_not_overwritten(written: Path, tmp_path: Path):
    shutil.copytree(written, tmp_path / "save")
    (tmp_path / "save" / "latest_checkpointed_iteration.txt").unlink()
    flags = RUN | {"--save": tmp_path / "save", "--load": tmp_path / "save"}
    assert_one_line(pretrain(tmp_path / "log", 1, flags), "no latest_checkpointed_iteration.txt", "(2, 4)")


def test_the_first_start_of_a_command_that_goes_on_is_said(tmp_path: Path):
    flags = RUN | {"--save": tmp_path / "save", "--load": tmp_path / "save"}
    finished = succeed(tmp_path / "log", 1, flags)
    assert f" > --load {tmp_path / 'save'} holds no checkpoint yet: the run starts from scratch\n" in finished.output[0]
    assert "Overwriting" not in finished.text
    assert sorted(path.name for path in (tmp_path / "save").glob("iter_*")) == ["iter_0000002", "iter_0000004"]


def test_a_status_that_cannot_be_written_ends_the_run_before_it_trains(tmp_path: Path):
    (tmp_path / "save" / "run_status.json").mkdir(parents=True)
    finished = pretrain(tmp_path / "log", 1, RUN | {"--save": tmp_path / "save"})
    assert_one_line(finished, "run_status.json cannot be written (Is a directory)", "remove what is there")


def test_a_run_that_starts_anew_says_what_it_replaces(written: Path, tmp_path: Path):
    shutil.copytree(written, tmp_path / "save")
    finished = succeed(tmp_path / "log", 1, RUN | {"--save": tmp_path / "save"})
    assert (
        "holds checkpoints up to iter_0000004, which this run replaces as it starts from scratch" in finished.errors[0]
    )


def test_a_run_is_made_longer(written: Path, tmp_path: Path):
    """Its steps are those of a run of that length from where it goes on: the schedule is spread over the new length."""
    flags = RUN | {"--load": written, "--save": tmp_path / "save", "--train-iters": 8}
    finished = succeed(tmp_path / "log", 1, flags)
    assert "the learning rate decays over 8 iterations instead of the checkpoint's 4 iterations" in finished.output[0]
    rates = [record["learning_rate"] for record in records(tmp_path / "save" / "metrics.jsonl", "train")]
    whole = succeed(tmp_path / "log", 1, flags | {"--load": False, "--save": tmp_path / "whole"})
    assert whole.codes == [0]
    expected = [record["learning_rate"] for record in records(tmp_path / "whole" / "metrics.jsonl", "train")]
    assert len(rates) == 4 and rates == expected[4:]


def test_another_tensor_parallel_size_trains_the_same_model(tmp_path: Path):
    """101 tokens are padded to 128 rows on one rank and to 256 on two; the checkpoint's rows are what was trained."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeed(tmp_path / "log", 1, RUN | {"--save": whole})
    succeed(tmp_path / "log", 1, RUN | {"--save": parts, "--exit-interval": 2})
    finished = succeed(tmp_path / "log", 2, RUN | TP2 | {"--load": parts, "--save": parts})
    assert "padded to 128 rows as in the checkpoint, not to 256" in finished.output[0]
    expected, found = (
        [record["lm_loss"] for record in records(folder / "metrics.jsonl", "train")] for folder in (whole, parts)
    )
    assert found == pytest.approx(expected, rel=1e-5)  # sums over ranks are rounded in another order
    back = succeed(tmp_path / "log", 2, RUN | TP2 | {"--save": tmp_path / "two", "--exit-interval": 2})
    assert back.codes == [0, 0]
    finished = succeed(tmp_path / "log", 1, RUN | {"--load": tmp_path / "two", "--save": tmp_path / "one"})
    assert "padded to 256 rows as in the checkpoint, not to 128" in finished.output[0]


def with_room_for(size: int) -> Callable[[], None]:
    """The command on a disk on which no file can grow beyond ``size`` bytes."""

    def main() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        pretrain_command.main()

    return main


@pytest.mark.parametrize("saving", [{}, {"--async-save": True}], ids=["at once", "in the background"])
@pytest.mark.parametrize("size", [4_000, 40_000], ids=["nothing but records", "no shard"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    processes: int, size: int, saving: dict[str, Any], tmp_path: Path
):
    flags = RUN | saving | {"--save": tmp_path / "save", "--log-interval": 100}
    finished = pretrain(tmp_path / "log", processes, flags, main=with_room_for(size))
    assert_one_line(
        finished, f"--save {tmp_path / 'save'}: the checkpoint of iteration 2 cannot be written (", "make room"
    )
    assert "no checkpoint is there yet" in "".join(finished.errors)
    assert not list((tmp_path / "save").glob("*iter_*"))


def test_two_runs_do_not_share_a_folder(written: Path, tmp_path: Path):
    shutil.copytree(written, tmp_path / "save")
    with (tmp_path / "save" / ".lock").open("a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        finished = pretrain(tmp_path / "log", 2, RUN | {"--save": tmp_path / "save", "--load": tmp_path / "save"})
    assert_one_line(finished, f"--save {tmp_path / 'save'}: another run is writing there")


def test_no_checkpoint_of_nan_is_written(tmp_path: Path):
    flags = RUN | {"--lr": 1e30, "--clip-grad": 0, "--no-check-for-nan-in-loss-and-grad": True, "--save-interval": 1}
    finished = succeed(tmp_path / "log", 1, flags | {"--save": tmp_path / "save"})
    assert "warning: no checkpoint of iteration 4 is written: the parameters are not finite\n" in finished.errors[0]
    assert not (tmp_path / "save" / "iter_0000004").exists()
