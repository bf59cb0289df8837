"""Errors that a user can cause: one line on stderr, exit code 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

EXIT_CODE = 2


class UserError(Exception):
    """Something the user can mend.

    The message is one line that names the flag or file, the offending value and the remedy.
    """


def print_error(error: UserError) -> None:
    """Print the error's one line on standard error."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def run_cli(main: Callable[[], None]) -> None:
    """Run the ``main`` of a command of one process, turning a :class:`UserError` into its line and exit code.

    Programs of several ranks start through ``megatron_dwm.cli.launch`` instead.
    """
    try:
        main()
    except UserError as error:
        print_error(error)
        raise SystemExit(EXIT_CODE) from None
