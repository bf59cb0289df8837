"""Errors that a user can cause: one line on stderr, exit code 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_CODE = 2


class UserError(Exception):
    """Something the user can mend.

    The message is one line that names the flag or file, the offending value and the remedy.
    """


def exit_with(error: UserError) -> NoReturn:
    """Print ``error`` as one line on stderr and leave with :data:`EXIT_CODE`."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_CODE)


def run_cli(main: Callable[[], None]) -> None:
    """Run a command's ``main``, turning a :class:`UserError` into its line and exit code."""
    try:
        main()
    except UserError as error:
        exit_with(error)
