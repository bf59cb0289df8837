"""What is common to jobs: errors of outputs, and worker processes that are killed."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import pickle
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import dill
import multiprocess
import psutil
import pytest
from datatrove.pipeline.base import PipelineStep

from megatron_dwm.config.slurm import SlurmConfig
from megatron_dwm.corpora.pipelines import Job, _watched_workers, refuse_queued_job, refused_output, run_here, submit
from megatron_dwm.corpora.storage import OutputFolder
from megatron_dwm.corpora.unfinished import unfinished_work
from megatron_dwm.errors import UserError
from tests.unit.runtime.test_child_processes import is_running


def test_what_a_store_raises_is_one_line_and_a_mistake_of_ours_is_not_hidden():
    """Each kind of store has errors of its own, which are no OSError."""
    full = OSError(errno.ENOSPC, "No space left on device")
    for output, error, words in [
        ("out", full, "--output out: cannot be written (No space left on device)"),
        ("s3://b/out", full, "--output s3://b/out: cannot be written (No space left on device)"),
        ("s3://b/out", RuntimeError("no such endpoint"), "cannot be written (no such endpoint)"),
        ("s3://b/out", UserError("a line"), "a line"),
    ]:
        with pytest.raises(UserError) as raised, refused_output(output):
            raise error
        assert words in str(raised.value)
    with pytest.raises(RuntimeError), refused_output("out"):
        raise RuntimeError


@pytest.mark.parametrize(("noted", "is_refused"), [("7", True), ("7,8", True), ("8", False), ("7; rm x", False)])
def test_a_job_that_is_in_the_queue_holds_its_folder(
    noted: str, is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A command in place of SLURM's, for which job 7 is in the queue; a note that is none is not passed to it."""
    queue = tmp_path / "squeue"
    queue.write_text('#!/bin/sh\ncase "$*" in *=7*) echo 7 ;; esac\n')
    queue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "submitted").write_text(noted)
    said = f"--output x: SLURM job 7 of an earlier call .* scancel {noted.replace(',', ' ')}$"
    with pytest.raises(UserError, match=said) if is_refused else contextlib.nullcontext():
        refuse_queued_job(OutputFolder(str(tmp_path)), "--output", "x")


def test_work_that_cannot_begin_leaves_nothing(tmp_path: Path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"), unfinished_work(tmp_path / "work", "a job of some length"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


class Planted:
    """An object whose unpickling makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_lies_where_a_submission_puts_its_own_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A command in place of SLURM's gives the job the number 7."""
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 7\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    pickled = tmp_path / "logs" / "executor.pik"
    pickled.parent.mkdir()
    pickled.write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    job = Job([Killed()], 1, str(tmp_path / "logs"))
    assert submit("score", [job], 1, SlurmConfig(slurm_partition="cpu"), OutputFolder(str(tmp_path))) == "7"
    assert not (tmp_path / "ran").exists()
    with pickled.open("rb") as file:
        assert isinstance(dill.load(file).pipeline[0], Killed)


class Killed(PipelineStep):
    """Kills the process of one task."""

    type = name = "killed"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("handling", [signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background"])
def test_a_worker_that_is_killed_ends_the_job_and_finished_tasks_are_kept(
    handling: Any, tmp_path: Path, request: pytest.FixtureRequest
):
    """datatrove's pool would wait for the lost task for ever."""
    previous = signal.signal(signal.SIGINT, handling)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, previous))
    with (
        pytest.raises(UserError, match=r"a worker process ended \(killed by SIGKILL\); give fewer workers"),
        refused_output("out"),
    ):
        run_here(Job([Killed()], 3, str(tmp_path / "logs")), workers=2)
    assert "00001" not in {path.name for path in (tmp_path / "logs").glob("completions/*")}


def test_a_worker_that_is_killed_when_all_is_done_interrupts_nothing(monkeypatch: pytest.MonkeyPatch):
    send, is_seen = signal.pthread_kill, threading.Event()

    def send_late(thread: int, number: int) -> None:
        is_seen.set()
        time.sleep(0.3)  # until the block has ended
        send(thread, number)

    monkeypatch.setattr(signal, "pthread_kill", send_late)
    with _watched_workers():
        workers = [multiprocess.Process(target=time.sleep, args=(60,)) for _ in range(2)]
        for worker in workers:
            worker.start()
        time.sleep(1)  # until both have been seen
        for worker in workers:
            worker.kill()
        assert is_seen.wait(60)


class KilledWithChildren(PipelineStep):
    """Kills the process that runs it, which is the job's if it has one worker; names the process's children before."""

    type = name = "killed"

    def __init__(self, names: Path) -> None:
        super().__init__()
        self.names = names

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        self.names.write_text(" ".join(str(child.pid) for child in psutil.Process().children()))
        os.kill(os.getpid(), signal.SIGKILL)


def test_no_process_of_a_job_outlives_it_when_it_is_killed(tmp_path: Path):
    job = Job([KilledWithChildren(tmp_path / "children")], 1, str(tmp_path / "logs"))
    process = multiprocessing.get_context("fork").Process(target=run_here, args=(job, 1))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    children = [int(pid) for pid in (tmp_path / "children").read_text().split()]
    deadline = time.monotonic() + 10
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.01)
    survivors = [pid for pid in children if is_running(pid)]
    for pid in survivors:
        os.kill(pid, signal.SIGKILL)
    assert children and not survivors
