"""``progress.txt`` in the ``--save`` folder: when jobs of a run started, and what each had done at its checkpoints.

The lines are Megatron-LM's, and files that it wrote are continued.
"""

from __future__ import annotations

import logging
import os
import time
from datetime import datetime
from pathlib import Path

from megatron_dwm.runtime.record_writers import open_to_append
from megatron_dwm.training.train_state import TrainState

logger = logging.getLogger(__name__)

_TIME = "%Y-%m-%d %H:%M:%S"
_STARTED = "Starting job"
_OPERATIONS = "Floating-point operations: "


class ProgressLog:
    """Appends to ``progress.txt`` on the first rank. A file that cannot be written does not stop training."""

    def __init__(self, folder: Path | None, world_size: int = 1, sequence: int = 0, operations: float = 0.0) -> None:
        """Write a line that the job starts.

        Args:
            folder: folder of the file; None to write nothing.
            world_size: the number of processes.
            sequence: tokens of one sample.
            operations: floating-point operations of the model's training so far.
        """
        self._path = None if folder is None else folder / "progress.txt"
        self._world_size, self._sequence, self._start_operations = world_size, sequence, operations
        self._started = time.perf_counter()
        self._append(_STARTED)

    def saved(self, train_state: TrainState, *, is_async: bool) -> None:
        """Write a line that a checkpoint was saved, or is being saved, with the run's throughput.

        The cumulative throughput counts from the start of the first job with the current number of processes.
        """
        if self._path is None:
            return
        operations = train_state.num_floating_point_operations_so_far
        first = self._first_job()
        cumulative = 0.0
        if first is not None:
            seconds = max((datetime.now() - first[0]).total_seconds(), 1e-9)
            cumulative = self._per_process(operations - first[1], seconds)
        job = self._per_process(operations - self._start_operations, time.perf_counter() - self._started)
        tokens = train_state.consumed_train_samples * self._sequence
        self._append(
            f"{'Saving async checkpoint' if is_async else 'Saved checkpoint'}\tIteration: {train_state.iteration}\t"
            f"Job throughput: {job:.1f} TFLOP/s/GPU\tCumulative throughput: {cumulative:.1f} TFLOP/s/GPU\t"
            f"{_OPERATIONS}{operations:.2e}\tTokens (in billions): {tokens / 1e9:.2f}"
        )

    def finished_async(self, iteration: int) -> None:
        """Write a line that a checkpoint that was saved in the background is complete."""
        self._append(f"Saved async checkpoint\tIteration: {iteration}")

    def deleted(self, iteration: int) -> None:
        """Write a line that an older checkpoint was deleted."""
        self._append(f"Deleted checkpoint\tIteration: {iteration}")

    def _per_process(self, operations: float, seconds: float) -> float:
        return operations / (seconds * 1e12 * self._world_size)

    def _append(self, event: str) -> None:
        if self._path is None:
            return
        job = os.getenv("SLURM_JOB_ID", "")
        try:
            with open_to_append(self._path) as file:
                file.write(f"{datetime.now():{_TIME}}\tJob ID: {job}\t# GPUs: {self._world_size}\t{event}\n")
        except OSError as error:
            logger.warning(f"{self._path}: cannot be written ({error.strerror}); an entry is lost")

    def _first_job(self) -> tuple[datetime, float] | None:
        """Return when the first job of the current number of processes started, and the operations done before it.

        Jobs before the last change of that number do not count, nor do lines of another kind.
        """
        first, operations = None, 0.0
        if self._path is None or not self._path.is_file():  # reading a named pipe would wait for a writer
            return None
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return None
        for line in lines:
            fields = line.split("\t")
            try:
                started, processes = datetime.strptime(fields[0], _TIME), int(fields[2].removeprefix("# GPUs: "))
                done = [float(field.removeprefix(_OPERATIONS)) for field in fields if field.startswith(_OPERATIONS)]
            except (IndexError, ValueError):
                continue
            operations = done[0] if done else operations
            if processes != self._world_size:
                first = None
            elif first is None and fields[3:] == [_STARTED]:
                first = started, operations
        return first
