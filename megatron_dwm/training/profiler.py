"""Profiling of some iterations, by PyTorch or nsys, and recording of the GPU's allocations."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_dwm.config.profiling import ProfilingConfig
from megatron_dwm.errors import UserError, shortened
from megatron_dwm.runtime.logging import EVERY_RANK

logger = logging.getLogger(__name__)


@contextmanager
def _lost_if_unwritable(path: str) -> Iterator[None]:
    """Turn errors of writing inside the context into a warning, because a profile never stops training."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the path is a folder
        logger.warning(f"{path}: cannot be written ({shortened(error)}); it is lost", extra=EVERY_RANK)


class StepProfiler:
    """Implements ``--profile`` and ``--record-memory-history`` on the ranks that the flags name."""

    def __init__(self, flags: ProfilingConfig, tensorboard_dir: str | None, rank: int, *, is_last_rank: bool) -> None:
        """
        Raises:
            UserError: there is no GPU, and the flags need one.
        """
        needing = {
            "--profile without --use-pytorch-profiler": flags.profile and not flags.use_pytorch_profiler,
            "--record-memory-history": flags.record_memory_history,
        }
        for name, is_asked in needing.items():
            if is_asked and not torch.cuda.is_available():
                raise UserError(f"{name} needs a GPU; leave it out")
        self._flags = flags
        self._profiler: Any = None
        self._ranges: Any = None
        self._is_profiled = flags.profile and rank in flags.profile_ranks
        self._should_write_memory = flags.record_memory_history and is_last_rank
        if flags.record_memory_history:
            torch.cuda.memory._record_memory_history(max_entries=100_000)  # noqa: SLF001 - documented under this name
        if self._is_profiled and flags.use_pytorch_profiler:
            self._profiler = self._started(str(tensorboard_dir))

    def _started(self, folder: str) -> Any:
        start, end = self._flags.profile_step_start, self._flags.profile_step_end
        write_trace = torch.profiler.tensorboard_trace_handler(folder)

        def write(profiler: torch.profiler.profile) -> None:
            with _lost_if_unwritable(f"--tensorboard-dir {folder}"):
                write_trace(profiler)

        profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(
                wait=max(start - 1, 0), warmup=1 if start > 0 else 0, active=end - start, repeat=1
            ),
            on_trace_ready=write,
            record_shapes=True,
            with_stack=True,
        )
        profiler.start()
        return profiler

    def after_iteration(self, number: int, iteration: int) -> None:
        """Begin or end profiling.

        Args:
            number: number of the iteration in this process, from 1 on, which PyTorch profiling uses, as in Megatron-LM.
            iteration: the run's iteration, which nsys profiling uses for its range.
        """
        if not self._is_profiled:
            return
        if self._profiler is not None:
            self._profiler.step()
            if number == self._flags.profile_step_end:
                self.close()
        elif not self._flags.use_pytorch_profiler and iteration == self._flags.profile_step_start:
            torch.cuda.cudart().cudaProfilerStart()
            self._ranges = torch.autograd.profiler.emit_nvtx(record_shapes=True)
            self._ranges.__enter__()
        elif iteration == self._flags.profile_step_end:
            self.close()

    def write_memory(self) -> None:
        """Write the GPU's allocations to ``--memory-snapshot-path``."""
        if self._should_write_memory:
            with _lost_if_unwritable(f"--memory-snapshot-path {self._flags.memory_snapshot_path}"):
                torch.cuda.memory._dump_snapshot(self._flags.memory_snapshot_path)  # noqa: SLF001

    def close(self) -> None:
        """End profiling, if it has not ended yet."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
        if self._ranges is not None:
            torch.cuda.cudart().cudaProfilerStop()
            self._ranges.__exit__(None, None, None)
            self._ranges = None
