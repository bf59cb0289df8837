"""What ends a run early, on one process."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch.distributed as dist

from megatron_dwm.config.training import TrainingConfig
from megatron_dwm.runtime import stop_signals
from megatron_dwm.runtime.stop_signals import STOP_SIGNALS, StartSignals
from megatron_dwm.training.stop_request import EvaluationInterruptedError, StopRequest
from tests.distributed.harness import run_distributed


def reason_after(number: int | None, iteration: int, **flags: object) -> str | None:
    request = StopRequest(TrainingConfig(micro_batch_size=1, train_iters=9, **flags))
    request.listen()
    if number is not None and dist.get_rank() == dist.get_world_size() - 1:
        os.kill(os.getpid(), number)
    return request.reason(iteration)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_that_one_rank_receives_is_every_ranks_reason(number: signal.Signals):
    reasons = run_distributed(lambda: reason_after(number, 1, exit_signal_handler=True), 2)
    assert reasons == [f"exiting program after receiving {number.name}."] * 2


@pytest.mark.parametrize("number", [signal.SIGUSR1, None])
def test_a_signal_that_one_rank_receives_breaks_every_ranks_evaluation_off(number: signal.Signals | None):
    def broken_off_by() -> str | None:
        request = StopRequest(TrainingConfig(micro_batch_size=1, train_iters=9, exit_signal_handler=True))
        request.listen()
        if number is not None and dist.get_rank() == 0:
            os.kill(os.getpid(), number)
        try:
            request.interrupt_if_signaled()
        except EvaluationInterruptedError as error:
            return str(error)
        return None

    assert run_distributed(broken_off_by, 2) == [number and number.name] * 2


def test_a_run_under_nohup_goes_on_when_its_terminal_is_closed():
    def reason() -> str | None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        StartSignals().close()
        return reason_after(signal.SIGHUP, 1, exit_signal_handler=True)

    assert run_distributed(reason, 1) == [None]


def test_a_signal_at_the_end_of_the_start_is_the_runs():
    def reason() -> str | None:
        stop_signals.PATIENCE_SECONDS = 0.2
        start = StartSignals()
        os.kill(os.getpid(), signal.SIGTERM)
        start.close()
        request = StopRequest(TrainingConfig(micro_batch_size=1, train_iters=9, exit_signal_handler=True))
        request.listen()
        deadline = time.monotonic() + 20
        while not request._received and time.monotonic() < deadline:
            time.sleep(0.01)
        return request.reason(1)

    assert run_distributed(reason, 1) == ["exiting program after receiving SIGTERM."]


@pytest.mark.parametrize("interval", [2, 0])
def test_without_a_reason_the_run_goes_on(interval: int):
    assert run_distributed(lambda: reason_after(None, 1, exit_signal_handler=True, exit_interval=interval), 1) == [None]


def test_no_minutes_are_no_limit():
    assert run_distributed(lambda: reason_after(None, 1, exit_duration_in_mins=0), 1) == [None]


def test_the_time_is_every_ranks_reason_when_one_finds_it_over():
    def reason() -> str | None:
        request = StopRequest(TrainingConfig(micro_batch_size=1, train_iters=9, exit_duration_in_mins=5))
        if dist.get_rank() == 1:
            request._started -= 301
        return request.reason(1)

    reasons = run_distributed(reason, 2)  # each says its own time
    assert [text is not None and text.startswith("exiting program after ") for text in reasons] == [True] * 2


def test_an_interval_is_a_reason():
    assert run_distributed(lambda: reason_after(None, 4, exit_interval=2), 1) == ["exiting program at iteration 4"]
