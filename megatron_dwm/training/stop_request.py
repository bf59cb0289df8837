"""Requests to end a run before its last iteration: a signal, a time limit, or an interval."""

from __future__ import annotations

import math
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from megatron_dwm.config.training import TrainingConfig
from megatron_dwm.runtime.device import current_device
from megatron_dwm.runtime.stop_signals import signals_to_handle


class EvaluationInterruptedError(Exception):
    """A signal interrupted an evaluation, which the resumed run will repeat."""


class StopRequest:
    """Watches for requests to end the run early, so that it can save before it exits."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self._started = time.perf_counter()
        self._received = 0

    def listen(self) -> None:
        """Treat signals as a request to save and exit, with ``--exit-signal-handler``."""
        if self.config.exit_signal_handler:
            for number in signals_to_handle():
                signal.signal(number, self._receive)

    def reason(self, iteration: int) -> str | None:
        """Return why the run ends after this iteration, or None if it continues; the same on all ranks."""
        config = self.config
        if config.exit_signal_handler or config.exit_duration_in_mins:
            minutes = (time.perf_counter() - self._started) / 60
            is_late = minutes > (config.exit_duration_in_mins or math.inf)
            requests = torch.tensor([float(self._received), float(is_late)], device=current_device())
            dist.all_reduce(requests, op=dist.ReduceOp.MAX)
            if requests[0]:
                return f"exiting program after receiving {signal.Signals(int(requests[0])).name}."
            if requests[1]:
                return f"exiting program after {minutes} minutes"
        if config.exit_interval and iteration % config.exit_interval == 0:
            return f"exiting program at iteration {iteration}"
        return None

    def interrupt_if_signaled(self) -> None:
        """Interrupt an evaluation if a signal asks the run to stop; every rank calls it.

        Completing it could take longer than the time that is left to save a checkpoint.

        Raises:
            EvaluationInterruptedError: on every rank, if one has received a signal.
        """
        if self.config.exit_signal_handler:
            received = torch.tensor(float(self._received), device=current_device())
            dist.all_reduce(received, op=dist.ReduceOp.MAX)
            if received:
                raise EvaluationInterruptedError(signal.Signals(int(received)).name)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
