"""Timers: those of the level that is asked for, attached to a training step alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Literal

import pytest

from megatron_dwm.config.profiling import ProfilingConfig
from megatron_dwm.runtime.timers import StepTimers
from tests.distributed.harness import run_distributed


def test_level_0_times_nothing():
    timers, config = StepTimers(ProfilingConfig()), SimpleNamespace(timers=None)
    with timers.attached(config), timers.timed("optimizer"):
        assert config.timers is None
    assert timers.text(1, should_reset=True) is None
    assert timers.largest(1) == {}


def test_megatron_core_has_timers_while_they_are_attached():
    timers, config = StepTimers(ProfilingConfig(timing_log_level=1)), SimpleNamespace(timers=None)
    with timers.attached(config):
        # What its schedules do; a timer above the level is a dummy, which cannot be read.
        config.timers("forward-compute", log_level=2).start()
        config.timers("forward-compute").stop()
        assert config.barrier_with_L1_time
    assert config.timers is None


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("max", "max time across ranks (ms):"),
        ("minmax", "(min, max) time across ranks (ms):"),
        ("all", "times across ranks (ms):"),
    ],
)
def test_the_option_is_what_is_said_of_the_ranks(option: Literal["max", "minmax", "all"], said: str):
    def first_line() -> str:
        timers = StepTimers(ProfilingConfig(timing_log_level=1, timing_log_option=option))
        with timers.timed("optimizer"):
            pass
        return str(timers.text(1, should_reset=True)).partition("\n")[0]

    assert run_distributed(first_line, 1) == [said]
