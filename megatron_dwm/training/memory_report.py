"""Megatron-LM's reports of a GPU's memory; there are none without a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from megatron_dwm.config.logging import LoggingConfig
from megatron_dwm.model.memory import MEBIBYTE
from megatron_dwm.runtime.logging import EVERY_RANK
from megatron_dwm.runtime.process_groups import ParallelState

logger = logging.getLogger(__name__)


class MemoryReport:
    """Logs the memory of this rank's GPU, and an estimate of it."""

    def __init__(
        self, flags: LoggingConfig, parallel_state: ParallelState, estimate: Callable[[], Sequence[str]]
    ) -> None:
        """
        Args:
            estimate: returns the lines of the estimate.
        """
        self.flags, self.parallel_state, self._estimate = flags, parallel_state, estimate
        self._has_estimated = False
        self._first_reports_left = 2

    def after_log_line(self, iteration: int) -> None:
        """Log the memory after the first two log lines, when it includes the optimizer's state, then at an interval.

        The estimate is logged once, and only with a GPU, because it is for training in mixed precision.
        """
        interval = self.flags.log_memory_interval
        if not self._has_estimated and torch.cuda.is_available():
            logger.info("\n".join(self._estimate()))
        self._has_estimated = True
        if self._first_reports_left > 0 or (interval is not None and iteration % interval == 0):
            self._first_reports_left -= 1
            self.log(f"(after {iteration} iterations)")

    def log(self, when: str) -> None:
        """Log the memory on the ranks of the first replica.

        Args:
            when: the point of the run.
        """
        if not torch.cuda.is_available() or self.parallel_state.dp_rank != 0:
            return
        figures = {
            "allocated": torch.cuda.memory_allocated(),
            "max allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "max reserved": torch.cuda.max_memory_reserved(),
        }
        if self.flags.log_device_memory_used:
            figures["total device memory used"] = torch.cuda.device_memory_used()
        text = " | ".join(f"{name}: {value / MEBIBYTE:.2f}" for name, value in figures.items())
        logger.info(f"[Rank {self.parallel_state.rank}] {when} memory (MB) | {text}", extra=EVERY_RANK)

    def curves(self) -> dict[str, float]:
        """Return the points of ``--log-memory-to-tensorboard``, by the names of their curves."""
        if not (self.flags.log_memory_to_tensorboard and torch.cuda.is_available()):
            return {}
        stats = torch.cuda.memory_stats()
        return {
            "mem-reserved-bytes": stats["reserved_bytes.all.current"],
            "mem-allocated-bytes": stats["allocated_bytes.all.current"],
            "mem-max-allocated-bytes": stats["allocated_bytes.all.peak"],
            "mem-allocated-count": stats["allocation.all.current"],
        }
