"""Errors that a user can cause: one line on stderr, exit code 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

EXIT_CODE = 2


class UserError(Exception):
    """Something the user can mend.

    The message is one line that names the flag or file, the offending value and the remedy.
    """


def run_cli(main: Callable[[], None], *, speaks: bool = True) -> None:
    """Run a command's ``main``, turning a :class:`UserError` into its line and exit code.

    Args:
        speaks: whether this process prints the line; of several that fail alike, one should.
    """
    try:
        main()
    except UserError as error:
        if speaks:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_CODE) from None
