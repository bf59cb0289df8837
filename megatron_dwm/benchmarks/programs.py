"""Commands of the package, started as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from megatron_dwm.cli.main import PROGRAM
from megatron_dwm.errors import UserError

_LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
"""Variables that torchrun sets, which must not be inherited by processes that start other ranks."""


def call(command: str, *arguments: object, log: Path | None = None) -> None:
    """Run ``megatron-dwm command`` in a separate process.

    Args:
        command: the name of the command.
        arguments: its flags and their values.
        log: the file that receives what it prints.

    Raises:
        UserError: it ended with another code than 0.
    """
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    # Concurrent runs would compete for the cores if each used one thread per core.
    present = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
    environment = {"OMP_NUM_THREADS": "1", **present}
    argv = [sys.executable, "-m", "megatron_dwm.cli.main", command, *map(str, arguments)]
    with (log or Path(os.devnull)).open("w") as output:
        finished = subprocess.run(argv, stdout=output, stderr=subprocess.PIPE, text=True, env=environment)
        output.write(finished.stderr)
    if finished.returncode:
        reason = (finished.stderr.strip() or "no reason given").splitlines()[-1]
        raise UserError(
            f"{PROGRAM} {command} ended with code {finished.returncode}: {reason}" + (f"; see {log}" if log else "")
        )
