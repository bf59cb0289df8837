"""Whether a run is running, was interrupted or has finished, for the script that started it.

``<save>/run_status.json`` is ``{"status": "running" | "interrupted" | "finished", "iteration": N, "reason": "..."}``. A
run that was asked to stop (by a signal, its time or an interval) ends with exit code 0 as one that has finished does,
since launchers kill the other ranks at any other code; the status tells the two apart.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from megatron_dwm.atomic_write import atomic_write_text

FILE_NAME = "run_status.json"


def write_run_status(
    save: str | None, status: Literal["running", "interrupted", "finished"], iteration: int, reason: str = ""
) -> None:
    """Write the status on the first rank; nothing without a ``--save`` folder."""
    if save is not None and dist.get_rank() == 0:
        text = json.dumps({"status": status, "iteration": iteration, "reason": reason})
        atomic_write_text(Path(save) / FILE_NAME, text + "\n")
