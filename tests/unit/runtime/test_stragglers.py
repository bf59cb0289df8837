"""``--log-straggler``, which megatron-core has for GPUs alone."""

from __future__ import annotations

import pytest

from megatron_dwm.config.profiling import ProfilingConfig
from megatron_dwm.errors import UserError
from megatron_dwm.runtime.stragglers import StragglerReport


def test_it_is_refused_without_a_gpu():
    with pytest.raises(UserError, match=r"^--log-straggler needs a GPU; leave it out$"):
        StragglerReport(ProfilingConfig(log_straggler=True), rank=0, world_size=2)


def test_without_the_flag_nothing_is_timed_or_printed(caplog: pytest.LogCaptureFixture):
    report = StragglerReport(ProfilingConfig(), rank=0, world_size=2)
    with report.reading() as reading, report.forward_pass as forward_pass:
        report.count(1e12)
    report.report()
    assert reading is None and forward_pass is None and not caplog.records
