"""``--log-energy``: the energy of a run's GPUs, by megatron-core's monitor, which uses NVML."""

from __future__ import annotations

from typing import Any

import torch

from megatron_dwm.errors import UserError
from megatron_dwm.extras import require_packages


class EnergyMeter:
    """Energy of all ranks' GPUs while training; without ``--log-energy`` all calls do nothing."""

    def __init__(self, *, is_wanted: bool) -> None:
        """Start to count energy.

        Raises:
            UserError: the flag is given, and there is no GPU or no NVML.
        """
        self._monitor: Any = None
        if not is_wanted:
            return
        if not torch.cuda.is_available():
            raise UserError("--log-energy needs a GPU; leave it out")
        require_packages("--log-energy", "pynvml")
        import pynvml
        from megatron.core.energy_monitor import EnergyMonitor

        monitor = EnergyMonitor()
        try:
            monitor.setup()
        except pynvml.NVMLError as error:
            raise UserError(f"--log-energy: NVML does not answer ({error}); leave it out") from None
        monitor.resume()
        self._monitor = monitor

    def pause(self) -> None:
        """Stop counting energy."""
        if self._monitor is not None:
            self._monitor.pause()

    def resume(self) -> None:
        """Continue counting energy."""
        if self._monitor is not None:
            self._monitor.resume()

    def lap(self) -> float | None:
        """Return the joules of all GPUs since the last lap; collective. None if nothing is measured."""
        return None if self._monitor is None else float(self._monitor.lap())

    def close(self) -> float | None:
        """End, and return the joules of all GPUs in all laps; collective. None if nothing was measured."""
        if self._monitor is None:
            return None
        self._monitor.lap()
        total = float(self._monitor.get_total())
        self._monitor.shutdown()
        self._monitor = None
        return total
