"""Runs of several processes take turns, whichever worker of pytest starts them.

Where processes outnumber the cores, one that waits for a message waits until its sender is scheduled: two runs of four
processes beside each other took several times as long as one after the other.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from filelock import FileLock

_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))

several_processes = FileLock(Path(tempfile.gettempdir(), f"megatron-dwm-tests-{_RUN}.lock"))
