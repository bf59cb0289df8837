"""A run that is asked to stop saves, says so in its status, and ends; submitted again it goes on as if undisturbed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_dwm.cli import pretrain as pretrain_command
from megatron_dwm.model.engine import PipelineEngine
from megatron_dwm.training import setup, trainer
from megatron_dwm.training.checkpoint import CheckpointWriter
from tests.e2e.launch import pretrain, records, succeed
from tests.e2e.test_uniform_weights import assert_same_checkpoints
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, WEIGHTING

# Data loader processes are what is default; they get the signal, too.
FLAGS = {
    **LANGUAGE_MODEL,
    **TRAINING,
    **DATA,
    **WEIGHTING,
    **{"--num-workers": 2, "--train-iters": 12, "--eval-interval": 20, "--exit-signal-handler": True},
    "--save-interval": 8,
}
DISTRIBUTED = {"--use-distributed-optimizer": True, "--dist-ckpt-optim-fully-reshardable": True}


def signaled_after(iteration: int, metrics: Path) -> Callable[[], None]:
    """The command whose ranks get SIGTERM, each when it sees that this iteration is recorded."""

    def watch() -> None:
        while not metrics.is_file() or len(records(metrics, "train")) < iteration:
            time.sleep(0.005)
        os.killpg(0, signal.SIGTERM)

    def main() -> None:
        os.setsid()  # the signal goes to the loaders' processes as well, as SLURM's does
        threading.Thread(target=watch, daemon=True).start()
        pretrain_command.main()

    return main


def test_a_signal_to_every_process_of_a_run_loses_nothing(tmp_path: Path):
    save, whole = tmp_path / "interrupted", tmp_path / "whole"
    flags = {**FLAGS, **DISTRIBUTED, "--save": save, "--load": save}
    finished = pretrain(tmp_path / "log", 2, flags, main=signaled_after(4, save / "metrics.jsonl"))
    assert finished.codes == [0, 0] and "Warning" not in finished.text, finished.text
    status = json.loads((save / "run_status.json").read_text())
    assert status["status"] == "interrupted" and "SIGTERM" in status["reason"], status
    assert 4 <= status["iteration"] < 12
    assert (save / f"iter_{status['iteration']:07d}" / "metadata.json").is_file()

    succeed(tmp_path / "resumed", 2, flags)
    assert json.loads((save / "run_status.json").read_text())["status"] == "finished"
    succeed(tmp_path / "log", 2, {**FLAGS, **DISTRIBUTED, "--save": whole})
    assert_same_checkpoints(whole / "iter_0000012", save / "iter_0000012")


def test_a_run_is_finished_when_it_has_trained_and_evaluated(tmp_path: Path):
    """One that ends after its last iteration, before the evaluation that follows, has more to do."""
    save = tmp_path / "save"
    flags = {**FLAGS, "--num-workers": 0, "--train-iters": 12, "--exit-interval": 6, "--save": save, "--load": save}
    found = []
    for _ in range(3):
        succeed(tmp_path / "log", 1, flags)
        status = json.loads((save / "run_status.json").read_text())
        evaluated = [record["split"] for record in records(save / "metrics.jsonl", "evaluation")]
        found.append((status["status"], status["iteration"], evaluated))
    assert found == [("interrupted", 6, []), ("interrupted", 12, []), ("finished", 12, ["valid", "test"])]


def signaled_at_pass(count: int, *, forward_only: bool) -> Callable[[], None]:
    """The command that gets SIGTERM at its ``count``-th pass of training, or of evaluation, from its start on."""

    def main() -> None:
        run, passes = PipelineEngine.run, []

        def signaled_run(engine: PipelineEngine, *args: Any, **settings: Any) -> Any:
            if bool(settings.get("forward_only")) == forward_only:
                passes.append(args)
                if len(passes) == count:
                    os.kill(os.getpid(), signal.SIGTERM)
            return run(engine, *args, **settings)

        PipelineEngine.run = signaled_run
        pretrain_command.main()

    return main


def signaled_in_save() -> None:
    """The command that gets SIGTERM while it writes its first checkpoint."""
    publish = CheckpointWriter._publish

    def signaled(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        publish(*args)

    CheckpointWriter._publish = signaled
    pretrain_command.main()


def signaled_before_training() -> None:
    """The command that gets SIGTERM as soon as its start-up is over."""
    write = trainer.write_run_status

    def signaled(save: str | None, status: Any, *args: Any) -> None:
        if status == "running":
            os.kill(os.getpid(), signal.SIGTERM)
        write(save, status, *args)

    trainer.write_run_status = signaled
    pretrain_command.main()


def test_a_long_evaluation_is_broken_off_by_a_signal_and_made_when_the_run_goes_on(tmp_path: Path):
    whole, save = tmp_path / "whole", tmp_path / "save"
    flags = {
        **FLAGS,
        "--num-workers": 0,
        "--train-iters": 6,
        "--eval-interval": 3,
        "--eval-iters": 9,
        "--dwm-mode": "off",
    }
    flags |= {"--save-interval": 2}
    succeed(tmp_path / "log", 1, {**flags, "--save": whole})
    flags |= {"--save": save, "--load": save}
    stops = {  # and the evaluations that are recorded then
        "before the first iteration": (signaled_before_training, 1, []),
        "in a save, after which there is no other": (signaled_in_save, 2, []),
        "in the validation": (signaled_at_pass(3, forward_only=True), 3, []),
        "in that validation, when it is made up for": (signaled_at_pass(2, forward_only=True), 3, []),
        "in the step before a validation": (signaled_at_pass(3, forward_only=False), 6, [3]),
        "in the evaluation after training": (signaled_at_pass(9 + 9 + 2, forward_only=True), 6, [3, 6, 6]),
    }
    for when, (main, iteration, evaluated) in stops.items():
        finished = pretrain(tmp_path / "log", 1, flags, main=main)
        assert finished.codes == [0] and "exiting program after receiving SIGTERM." in finished.text, finished.text
        status = json.loads((save / "run_status.json").read_text())
        assert (status["status"], status["iteration"]) == ("interrupted", iteration), (when, status)
        assert [record["iteration"] for record in records(save / "metrics.jsonl", "evaluation")] == evaluated, when
        assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == str(iteration), when
    succeed(tmp_path / "log", 1, flags)
    assert json.loads((save / "run_status.json").read_text())["status"] == "finished"
    expected, found = (
        [(record["iteration"], record["split"], record["lm_loss"]) for record in records(path, "evaluation")]
        for path in (whole / "metrics.jsonl", save / "metrics.jsonl")
    )
    assert found == expected and len(found) == 4
    assert_same_checkpoints(whole / "iter_0000006", save / "iter_0000006")


@pytest.mark.parametrize("signaled", [[0, 1], [1]])
def test_a_signal_while_a_run_starts_ends_it_with_one_line_and_a_code_of_its_own(signaled: list[int], tmp_path: Path):
    """Rank 1 waits in the store for rank 0, which is at work; as it may be on a large dataset's index."""

    def main() -> None:
        def work(*_: object, **__: object) -> None:
            time.sleep(60)

        setup.check_data = work
        for rank in signaled:
            if os.environ["RANK"] == str(rank):
                threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        pretrain_command.main()

    finished = pretrain(tmp_path / "log", 2, {**FLAGS, "--save": tmp_path / "save"}, main=main)
    assert finished.codes == [75, 75], finished.text
    line = "error: SIGTERM received during start-up: there is nothing to save; start the run again\n"
    assert "".join(finished.errors) == line, finished.text
