"""The start of every command of one process; programs of several ranks start through ``launch``."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable

from megatron_dwm.errors import run_cli
from megatron_dwm.runtime.logging import configure_logging


def run_command(command: Callable[[], None]) -> None:
    """Run ``command`` so that its messages are printed and a user's error is one line with exit code 2.

    Warnings of the libraries are not shown: they are about accelerators and several ranks, which no such command has.

    Raises:
        SystemExit: the command ended early.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # paths may hold bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")
    configure_logging()
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        run_cli(command)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None  # as a shell reports a program that Ctrl-C has ended


def limit_progress_bars() -> None:
    """Let transformers draw its progress bars on a terminal only: a log file needs none."""
    from transformers.utils import logging as hf_logging

    if not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # of processes that this one starts
        disable: Callable[[], None] = hf_logging.disable_progress_bar
        disable()
