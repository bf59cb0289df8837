"""Jobs whose finished tasks are kept next to the output until it is complete, so that the same command continues."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Sequence
from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from megatron_dwm.config.slurm import SlurmConfig
from megatron_dwm.corpora.pipelines import FunctionStep, Job, refuse_queued_job, refused_output, run_here, submit
from megatron_dwm.corpora.storage import OutputFolder, absolute, is_url
from megatron_dwm.corpora.unfinished import LOCK, lock_folder
from megatron_dwm.errors import UserError

logger = logging.getLogger(__name__)

_WORK = "work.json"
"""The file with everything that the finished tasks depend on."""


class UnfinishedJobs:
    """A hidden folder next to an output, and the jobs that use it."""

    def __init__(self, output: str, flag: str, kind: str = "unfinished") -> None:
        """
        Args:
            output: path or URL of the output.
            flag: the flag that names it.
            kind: ending of the folder's name, ``.NAME.KIND``.

        Raises:
            UserError: it is behind a URL that no installed package reads.
        """
        self._output, self._flag = output, flag
        parent, name = posixpath.split(absolute(output))
        self._parent, self._name = OutputFolder(parent), f".{name}.{kind}"
        self.folder = OutputFolder(self._parent.path(self._name))

    def claim(self, work: str) -> None:
        """Create the folder, lock it on this machine until this process ends, and remove the files of other work.

        Args:
            work: everything that the output depends on.

        Raises:
            UserError: it cannot be written, or another process or a SLURM job uses it.
        """
        with refused_output(self._output, self._flag):
            if not is_url(self._output):
                lock_folder(Path(self.folder.location))
            refuse_queued_job(self.folder, self._flag, self._output)
            if self.folder.read(_WORK) != work:
                self.folder.remove(first=_WORK, keep=LOCK)
                self.folder.write(_WORK, work)

    def job(self, name: str, steps: Sequence[PipelineStep], tasks: int = 1) -> Job:
        """Return a job whose logs are in the folder."""
        return Job(steps, tasks, self.folder.path(f"logs/{name}"))

    def run(self, name: str, jobs: Sequence[Job], workers: int, slurm: SlurmConfig) -> str | None:
        """Run the unfinished tasks of all jobs, one job after the other, or submit them.

        Args:
            name: name of the command.
            workers: maximum number of concurrent tasks.

        Returns:
            the number of the last SLURM job; None if all tasks are done.

        Raises:
            UserError: bad input, or a file that cannot be written.
        """
        with refused_output(self._output, self._flag):
            if slurm.slurm_partition is not None:
                return submit(name, jobs, workers, slurm, self.folder)
            try:
                for job in jobs:
                    if isinstance(job.steps[0], FunctionStep):  # so fast that it is simply repeated
                        job.steps[0].run()
                    else:
                        run_here(job, workers)
            except UserError:  # the input or the flags must change
                self.remove()
                raise
            except BaseException:
                logger.info(f"Finished tasks are kept in {self.folder.location}; the same command continues from them.")
                raise
        return None

    def remove(self) -> None:
        """Remove the folder, so that a call after a kill meanwhile does not continue with what is left of it."""
        self.folder.remove(first=_WORK)

    def publish(self, name: str, to: str) -> None:
        """Move a finished file of the folder to its final name next to it."""
        self._parent.move(f"{self._name}/{name}", to)
