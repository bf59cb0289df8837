"""Subcommands: ``megatron-dwm WORD``."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_dwm.errors import UserError, run_cli


@dataclass(frozen=True)
class Command:
    """A subcommand: a module whose ``main()`` reads ``sys.argv``, and its description in one line."""

    module: str
    summary: str


def dispatch(program: str, commands: Mapping[str, Command], description: str) -> None:
    """Run the subcommand named by the first argument with the arguments after it.

    The module of a command is imported only when it is run: some of them take seconds to import.

    Args:
        program: the program's name, as the user types it.
        commands: the commands by name.
        description: the program's description in ``--help``.

    Raises:
        UserError: no such command, or none is given.
    """
    word, *rest = sys.argv[1:] or [""]
    if word in ("-h", "--help"):
        print(_help(program, commands, description))
        return
    if word not in commands:
        raise UserError(_unknown(program, word, commands))
    # So that the command finds its arguments in sys.argv, and its --help shows its name.
    sys.argv = [f"{program} {word}", *rest]
    importlib.import_module(commands[word].module).main()


def run_module(name: str) -> None:
    """Run the command in a module, the whole of a script: Ctrl-C ends it quietly, also while the module is imported."""
    run_cli(lambda: importlib.import_module(name).main())


def _help(program: str, commands: Mapping[str, Command], description: str) -> str:
    width = max(map(len, commands))
    rows = (f"  {name:{width}}  {command.summary}" for name, command in commands.items())
    return "\n".join(
        [
            f"usage: {program} COMMAND ...",
            "",
            description,
            "",
            "commands:",
            *rows,
            "",
            f"{program} COMMAND --help shows the flags of a command.",
        ]
    )


def _unknown(program: str, word: str, commands: Mapping[str, Command]) -> str:
    if not word:
        return f"{program} needs a command; give one of {', '.join(commands)}"
    alike = difflib.get_close_matches(word, commands, n=1)
    remedy = f"is it {alike[0]}?" if alike else f"give one of {', '.join(commands)}"
    return f"{program} has no command {word}; {remedy}"
