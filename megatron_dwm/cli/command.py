"""The entry point of commands that run in one process; programs with several ranks start through ``launch``."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable

from megatron_dwm.errors import run_cli
from megatron_dwm.runtime.logging import configure_logging


def run_command(command: Callable[[], None]) -> None:
    """Run ``command``; print its log messages, and a user's error as one line with exit code 2.

    Warnings of libraries are not shown: they concern accelerators and several ranks, which these commands do not use.

    Raises:
        SystemExit: the command ended early.
    """
    configure_logging()
    hide_warnings()
    run_cli(command)


def hide_warnings() -> None:
    """Hide the warnings of the libraries."""
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    # Tokenizers warn of texts that are longer than a model's context; these commands split or cut them.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)


def limit_progress_bars() -> None:
    """Show transformers' progress bars only on a terminal, and not in a log file."""
    from transformers.utils import logging as hf_logging

    if not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # of processes that this one starts
        disable: Callable[[], None] = hf_logging.disable_progress_bar
        disable()
