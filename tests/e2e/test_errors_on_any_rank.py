"""An error that one rank finds is printed by it, once, and ends every rank with the same exit code."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_dwm.cli import pretrain as pretrain_command
from megatron_dwm.data import validation
from megatron_dwm.errors import UserError
from megatron_dwm.training import step
from tests.e2e.datasets import TOKENIZER, counting, make_dataset
from tests.e2e.launch import assert_one_line, pretrain
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING

TP2 = {"--tensor-model-parallel-size": 2}
PP2 = {"--pipeline-model-parallel-size": 2}
PLAIN = {**LANGUAGE_MODEL, **TRAINING, "--dwm-mode": "off"}


def sample_little_of_the_vocabulary() -> None:
    """The command whose start-up check reads a few tokens, as it does of data that is too large to be read whole."""
    validation.VOCABULARY_SAMPLE = validation.VOCABULARY_PIECES
    pretrain_command.main()


@pytest.mark.parametrize(("layout", "processes"), [({}, 2), (TP2, 2), (PP2, 2), ({**TP2, **PP2}, 4)])
def test_a_token_outside_the_vocabulary_in_the_middle_of_a_run(layout: dict, processes: int, tmp_path: Path):
    documents = counting(1, documents=200)
    for document in documents[100:]:
        document[7] = 5000
    prefix = make_dataset(tmp_path, "train", documents, vocab_size=6000)
    flags = {**PLAIN, **TOKENIZER, **layout, "--train-data-path": prefix, "--data-cache-path": tmp_path / "cache"}
    finished = pretrain(tmp_path / "log", processes, flags, main=sample_little_of_the_vocabulary)
    assert_one_line(finished, "token 5000", "outside the tokenizer's vocabulary of 101", "--tokenizer-model")


def fail_on_the_last_rank(error: BaseException) -> Any:
    """The command in which the third step of the last rank fails."""

    def main() -> None:
        train_step, calls = step.train_step, []

        def failing_step(*args: Any) -> Any:
            calls.append(args)
            if len(calls) == 3 and dist.get_rank() == dist.get_world_size() - 1:
                raise error
            return train_step(*args)

        from megatron_dwm.training import trainer

        trainer.train_step = failing_step
        pretrain_command.main()

    return main


@pytest.mark.parametrize(("layout", "processes"), [({}, 2), (TP2, 2), (PP2, 2), ({**TP2, **PP2}, 4)])
def test_a_users_error_of_the_last_rank_is_printed_by_it_and_ends_all(layout: dict, processes: int, tmp_path: Path):
    main = fail_on_the_last_rank(UserError("--lr 3: as bad as it gets; lower it"))
    finished = pretrain(tmp_path / "log", processes, {**PLAIN, **DATA, **layout}, main=main)
    assert_one_line(finished, "--lr 3: as bad as it gets")
    assert finished.errors[-1]


@pytest.mark.parametrize(("layout", "processes"), [({}, 2), (PP2, 2)])
def test_a_failure_of_one_rank_ends_the_others_and_is_named(layout: dict, processes: int, tmp_path: Path):
    main = fail_on_the_last_rank(RuntimeError("a kernel failed\nin many lines"))
    finished = pretrain(tmp_path / "log", processes, {**PLAIN, **DATA, **layout}, main=main)
    assert finished.codes == [1] * processes, finished.text
    assert "Traceback" in finished.errors[-1] and "a kernel failed" in finished.errors[-1]
    expected = f"error: rank 0 ends because rank {processes - 1} failed (RuntimeError: a kernel failed)\n"
    assert finished.errors[0] == expected, finished.text


def kill_the_last_rank() -> None:
    """The command in which the last rank is killed in its third step."""
    train_step, calls = step.train_step, []

    def dying_step(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(*args)

    from megatron_dwm.training import trainer

    trainer.train_step = dying_step
    pretrain_command.main()


def test_survivors_of_a_killed_rank_end_and_one_names_it(tmp_path: Path):
    finished = pretrain(tmp_path / "log", 4, {**PLAIN, **DATA, **TP2, **PP2}, main=kill_the_last_rank)
    assert finished.codes == [1, 1, 1, -signal.SIGKILL], finished.text
    tracebacks = [errors for errors in finished.errors[:3] if "Traceback" in errors]
    assert len(tracebacks) == 1, finished.text
    assert "error: rank 3 does not answer" in tracebacks[0], finished.text


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        ({"RANK": "abc"}, ("RANK=abc", "not an integer")),
        ({"WORLD_SIZE": "2", "RANK": "5"}, ("RANK=5", "WORLD_SIZE=2")),
        ({"SLURM_PROCID": "3", "RANK": None, "WORLD_SIZE": None, "LOCAL_RANK": None}, ("--num-layers",)),
    ],
)
def test_the_environment_of_a_launcher_is_checked(environment: dict, parts: tuple[str, ...], tmp_path: Path):
    """``SLURM_PROCID`` outside a step is no rank: the process is alone, and says what is wrong with its flags."""

    def main() -> None:
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        pretrain_command.main()

    finished = pretrain(tmp_path / "log", 1, {**PLAIN, **DATA, "--num-layers": False}, main=main)
    assert_one_line(finished, *parts)
