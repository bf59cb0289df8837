"""Whether a run is running, was interrupted or has finished, for the script that started it.

``<save>/run_status.json`` is ``{"status": "running" | "interrupted" | "finished", "iteration": N, "reason": "...",
"folder": "..."}``; the folder is the one that the run was started from. A run that was asked to stop (by a signal, its
time or an interval) ends with exit code 0 like one that has finished, because launchers kill the other ranks at any
other code; the status distinguishes the two.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from megatron_dwm.atomic_write import atomic_write_text
from megatron_dwm.errors import UserError

RUN_STATUS = "run_status.json"


def write_run_status(
    save: str | None, status: Literal["running", "interrupted", "finished"], iteration: int, reason: str = ""
) -> None:
    """Write the status on the first rank; nothing without a ``--save`` folder.

    Raises:
        UserError: it cannot be written.
    """
    if save is not None and dist.get_rank() == 0:
        folder = ""
        with contextlib.suppress(FileNotFoundError):  # it was deleted while the run was at work
            folder = os.getcwd()
        text = json.dumps({"status": status, "iteration": iteration, "reason": reason, "folder": folder})
        path = Path(save) / RUN_STATUS
        try:
            atomic_write_text(path, text + "\n")
        except OSError as error:
            raise UserError(
                f"--save: {path} cannot be written ({error.strerror}) to record that the run is {status}; make room, "
                "or remove what is there"
            ) from None


def read_run_status(save: Path) -> dict[str, Any]:
    """Return the status of the run that saves to a folder; empty if there is none or the file is not a status."""
    try:
        status = json.loads((save / RUN_STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return status if isinstance(status, dict) else {}
