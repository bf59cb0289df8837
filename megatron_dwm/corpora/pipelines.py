"""Jobs on datatrove's executors, on this machine or on a SLURM cluster, and steps that several jobs use.

A job is a pipeline that is run once for each of its tasks. Its executor keeps in the folder of its logs which tasks are
done, and does the others only.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from subprocess import CalledProcessError
from types import FrameType
from typing import Any

import multiprocess
from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers.base import BaseDiskReader
from loguru import logger

from megatron_dwm.config.slurm import SlurmConfig
from megatron_dwm.corpora.parts import Part, records_of
from megatron_dwm.corpora.storage import OutputFolder, is_url
from megatron_dwm.corpora.worker_pool import WorkerDiedError
from megatron_dwm.errors import UserError, renamed_flags, shortened
from megatron_dwm.runtime.child_processes import end_children_with_this_process, require_temporary_folder

_WATCH_INTERVAL_S = 0.3  # between checks for dead workers
_SUBMITTED = "submitted"
"""The file with the numbers of the SLURM jobs that were submitted last."""
_WORKER_DIED = signal.SIGRTMIN
"""Signal that interrupts the main thread. Programs in the background ignore SIGINT."""


@dataclass(frozen=True)
class Job:
    """A pipeline with its number of tasks."""

    steps: Sequence[PipelineStep]
    tasks: int
    logs: str
    """Folder or URL of its logs, which record the finished tasks."""


class RecordReader(BaseDiskReader):  # type: ignore[misc]
    """Reader of the unchanged records of one part; each becomes the metadata of a document.

    datatrove's readers leave out malformed lines, empty documents and the end of a damaged file with a warning, and
    do not keep a line as it was.
    """

    name = "records"

    def __init__(self, parts: Sequence[Part], *, flag: str = "--input", columns: Sequence[str] | None = None) -> None:
        """
        Args:
            flag: the flag that names the files, for messages.
            columns: columns of tables that are read; None for all.
        """
        super().__init__("/", doc_progress=sys.stderr.isatty(), add_file_path=False)
        self.parts, self.flag, self.columns = list(parts), flag, columns

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the records of part number ``rank``.

        Raises:
            UserError: the part cannot be read.
        """
        with renamed_flags({"--input": self.flag}):
            yield from self.read_files_shard([str(rank)])

    def read_file(self, filepath: str) -> Iterator[Document]:
        """Yield the records of a part."""
        part = self.parts[int(filepath)]
        for record in records_of(part, self.columns):
            yield Document(text="", id=record.place, metadata={"record": record, "path": part.path})


class FilePublisher(PipelineStep):  # type: ignore[misc]
    """Step that renames the file of a task to its final name when the writer has closed it."""

    type, name = "writer", "published"

    def __init__(self, folder: OutputFolder, suffix: str, finished: str = "data") -> None:
        super().__init__()
        self.folder, self.suffix, self.finished = folder, suffix, finished

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents, and move the file when there are no more."""
        yield from data
        name = f"{rank:05d}{self.suffix}"
        self.folder.move(f"partial/{name}", f"{self.finished}/{name}")  # without documents there is no file


class FunctionStep(PipelineStep):  # type: ignore[misc]
    """Step that calls a function: a job of one task."""

    type, name = "call", "call"

    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__()
        self.function = function

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Call the function."""
        self.function()


class _QuietExecutor(LocalPipelineExecutor):  # type: ignore[misc]
    """datatrove's executor, without its log on the terminal; errors are raised."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        logger.disable("datatrove")
        with warnings.catch_warnings():  # as commands do; this may be another process
            warnings.simplefilter("ignore")
            return super()._run_for_rank(rank, local_rank, node_rank)


def run_here(job: Job, workers: int) -> Any:
    """Run a job on this machine; tasks that an earlier call has finished are not repeated.

    Returns:
        datatrove's statistics of this call; None if all tasks were done.

    Raises:
        UserError: processes cannot be reached on this machine.
        WorkerDiedError: a signal has killed a worker process.
    """
    logger.disable("datatrove")
    require_temporary_folder()
    end_children_with_this_process()  # datatrove's manager would outlive this process if that is killed
    workers = min(workers, job.tasks)
    executor = _QuietExecutor(list(job.steps), job.tasks, workers, logging_dir=job.logs)
    if workers == 1:
        return executor.run()
    with _watched_workers():
        return executor.run()


@contextmanager
def _watched_workers() -> Iterator[None]:
    """Raise an error if a worker process is killed inside the context; its pool would wait for the lost task forever.

    Raises:
        WorkerDiedError: a signal has killed a worker.
    """
    dead: list[str] = []
    is_over = threading.Event()

    def watch() -> None:
        seen: set[Any] = set()
        while not is_over.wait(_WATCH_INTERVAL_S):
            seen.update(multiprocess.active_children())
            codes = (process.exitcode or 0 for process in seen)
            # The pool itself ends its workers with SIGTERM when it has finished.
            killing = [-code for code in codes if code < 0 and -code != signal.SIGTERM]
            dead.extend(f"killed by {signal.Signals(code).name}" for code in killing)
            if dead and not is_over.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, _WORKER_DIED)
                return

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not is_over.is_set():  # else it would interrupt what follows
            raise WorkerDiedError(dead[0])

    previous = signal.signal(_WORKER_DIED, interrupt)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()
        signal.signal(_WORKER_DIED, previous)


def refuse_queued_job(folder: OutputFolder, flag: str, output: str) -> None:
    """Refuse to work in a folder that an earlier SLURM job writes to, or waits to.

    Args:
        folder: where :func:`submit` has noted the jobs' numbers.
        flag: the flag that names the output.

    Raises:
        UserError: there is such a job.
    """
    numbers = folder.read(_SUBMITTED) or ""
    if re.fullmatch(r"\d+(,\d+)*", numbers) is None or shutil.which("squeue") is None:  # elsewhere it cannot be known
        return
    queue = ["squeue", "--noheader", "--format=%A", f"--jobs={numbers}"]
    if queued := subprocess.run(queue, capture_output=True, text=True, check=False).stdout.split():
        raise UserError(
            f"{flag} {output}: SLURM job {queued[0]} of an earlier call is running or waiting; wait until it has "
            f"ended, or cancel it with scancel {numbers.replace(',', ' ')}"
        )


def submit(name: str, jobs: Sequence[Job], workers: int, slurm: SlurmConfig, folder: OutputFolder) -> str | None:
    """Submit the unfinished tasks of jobs as SLURM job arrays, each of which waits for the previous one.

    Args:
        workers: maximum number of concurrent tasks.
        folder: where the numbers of the jobs are noted, for :func:`refuse_queued_job`.

    Returns:
        the last job's number; None if all tasks are done.

    Raises:
        UserError: SLURM refuses it.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "--slurm-partition: there is no sbatch on this machine; run the command where SLURM jobs are submitted"
        )
    programs = os.path.dirname(sys.executable)
    executors: list[SlurmPipelineExecutor] = []
    for job in jobs:
        executor = SlurmPipelineExecutor(
            list(job.steps),
            tasks=job.tasks,
            workers=workers,
            time=slurm.slurm_time,
            partition=slurm.slurm_partition,
            gpus_per_task=slurm.slurm_gpus_per_task,
            mem_per_cpu_gb=slurm.slurm_memory_gb,
            job_name=f"megatron-dwm-{name}",
            qos=None,
            env_command=f"export PATH={shlex.quote(programs)}:$PATH",
            sbatch_args=slurm.sbatch_options(),
            logging_dir=job.logs,
            depends=executors[-1] if executors else None,
        )
        executors.append(executor)
    logger.disable("datatrove")
    try:
        if executors:
            executors[-1].run()
    except CalledProcessError as error:
        raise UserError(
            f"--slurm-partition {slurm.slurm_partition}: sbatch refuses the job with code {error.returncode} (its "
            "message is above); change the --slurm flags"
        ) from None
    finally:
        # datatrove's number of a job that has nothing left to do is -1, and of one that was not submitted None.
        numbers = [str(executor.job_id) for executor in executors if executor.job_id not in (None, -1)]
        if numbers:
            folder.write(_SUBMITTED, ",".join(numbers))
    return None if not executors or executors[-1].job_id == -1 else str(executors[-1].job_id)


@contextmanager
def refused_output(output: str, flag: str = "--output") -> Iterator[None]:
    """Convert failures to write a file, and the death of a worker process, to a UserError, inside the context."""
    try:
        yield
    except UserError:
        raise
    except WorkerDiedError as error:
        raise UserError(
            f"--workers: a worker process ended ({error}); give fewer workers or more memory, and run the command "
            "again, finished files are kept"
        ) from None
    except Exception as error:
        if not isinstance(error, OSError) and not is_url(output):  # each kind of storage has its own errors
            raise
        reason = (error.strerror if isinstance(error, OSError) else None) or shortened(error)
        raise UserError(
            f"{flag} {output}: cannot be written ({reason}); fix that and run the command again, finished files are "
            "kept"
        ) from None
