"""``--log-straggler``: reports slow ranks, with megatron-core's detector.

It times each rank's forward passes and the reading of batches, and reads its GPU's temperature, power, utilization and
clock. With every log line the first rank prints the minimum and maximum of each, and the ranks that have them. A
connection to ``--straggler-ctrlr-port`` of the first rank's machine turns it off or on.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from megatron_dwm.config.profiling import ProfilingConfig
from megatron_dwm.errors import UserError
from megatron_dwm.runtime.logging import print_messages_of


class StragglerReport:
    """megatron-core's detector; without ``--log-straggler`` all calls do nothing."""

    def __init__(self, flags: ProfilingConfig, rank: int, world_size: int) -> None:
        """
        Raises:
            UserError: the flag is given, and there is no GPU.
        """
        self._detector: Any = None
        self._operations, self._iterations = 0.0, 0
        if not flags.log_straggler:
            return
        if not torch.cuda.is_available():
            raise UserError("--log-straggler needs a GPU; leave it out")
        from megatron.core import utils

        print_messages_of(utils.__name__, rank, world_size)
        self._detector = utils.StragglerDetector()
        self._detector.configure(
            world_size,
            rank,
            mmcnt=flags.straggler_minmax_count,
            port=flags.straggler_ctrlr_port,
            enabled=not flags.disable_straggler_on_startup,
        )

    def reading(self) -> AbstractContextManager[Any]:
        """Return the context in which the batch of a step must be read."""
        return nullcontext() if self._detector is None else self._detector(bdata=True)

    @property
    def forward_pass(self) -> AbstractContextManager[Any]:
        """Return the context in which every forward pass of a training step must run."""
        return nullcontext() if self._detector is None else self._detector

    def count(self, operations: float) -> None:
        """Count the operations of a training step."""
        self._operations, self._iterations = self._operations + operations, self._iterations + 1

    def report(self) -> None:
        """Print a report on the steps since the last one; collective."""
        if self._detector is not None and self._iterations > 0:
            self._detector.report(self._operations, self._iterations)
        self._operations, self._iterations = 0.0, 0
