"""``--log-energy``, which NVML tells of GPUs alone."""

from __future__ import annotations

import pytest

from megatron_dwm.errors import UserError
from megatron_dwm.runtime.energy import EnergyMeter


def test_it_is_refused_without_a_gpu():
    with pytest.raises(UserError, match=r"^--log-energy needs a GPU; leave it out$"):
        EnergyMeter(is_wanted=True)


def test_without_the_flag_nothing_is_measured():
    meter = EnergyMeter(is_wanted=False)
    meter.pause()
    meter.resume()
    assert meter.lap() is None and meter.close() is None
