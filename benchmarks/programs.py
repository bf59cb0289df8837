"""Running the repository's programs as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from megatron_dwm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def call(*command: object, log: Path | None = None) -> None:
    """Run a program, named by its path in the repository, with flags; what it prints goes to ``log``.

    Raises:
        UserError: it ended with another code than 0.
    """
    place = log or Path(os.devnull)
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, str(ROOT / str(command[0])), *map(str, command[1:])]
    with place.open("w") as output:
        finished = subprocess.run(argv, stdout=output, stderr=subprocess.PIPE, text=True, env=environment)
        output.write(finished.stderr)
    if finished.returncode:
        reason = (finished.stderr.strip() or "no reason given").splitlines()[-1]
        raise UserError(
            f"{command[0]} ended with code {finished.returncode}: {reason}" + (f"; see {log}" if log else "")
        )
