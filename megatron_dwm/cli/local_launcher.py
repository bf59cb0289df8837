"""``--nproc N``: starts several ranks of a command on this machine, as ``torchrun --nproc-per-node`` does.

torchrun ends a failed run with some thirty lines of output and exit code 1. Here the failing rank's line is the last
one on the screen, and its exit code becomes the command's.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import megatron_dwm

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 600
"""How long ranks may take to save after a signal before they are killed."""


def supported_settings(config_class: type, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that this torch's launcher has; a warning names the others."""
    known = {field.name for field in dataclasses.fields(config_class)}
    if missing := sorted(settings.keys() - known):
        logger.warning(
            f"the launcher of torch {version('torch')} has no {' and no '.join(missing)}: after a signal it ends ranks "
            "that save for longer than its own limit; use srun, or a newer torch"
        )
    return {name: value for name, value in settings.items() if name in known}


def launch_locally(module: str, processes: int, argv: Sequence[str]) -> int:
    """Run ``python -m module argv`` as the ranks of one machine, and return the exit code of the run."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The ranks print the failure; the launcher would only repeat it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    settings: dict[str, Any] = {
        "signals_to_handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        "shutdown_timeout": SHUTDOWN_SECONDS,
    }
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,  # seconds, so that a failed run ends at once
        **supported_settings(LaunchConfig, settings),
    )
    # So that the ranks find this package even if it is not installed.
    package = str(Path(megatron_dwm.__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    try:
        elastic_launch(config, sys.executable)("-u", "-m", module, *argv)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        # For a signal, the exit code that a shell gives.
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval if isinstance(error.sigval, signal.Signals) else signal.SIGTERM)
    return 0
