"""``--run FOLDER``, the run that a command reads; the name of a command's main flag may be left out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dwm.config.flags import flag, require_given


@dataclass(frozen=True)
class RunArgument:
    """Flags of a command that reads a run's records."""

    run: str = flag(
        "", "A run's --save folder, or its --metrics-jsonl file. May also be given first and without the flag."
    )

    def __post_init__(self) -> None:
        require_given(self, "run", "give a run's --save folder")


def with_first_flag(argv: Sequence[str] | None, name: str = "--run") -> list[str]:
    """Return the arguments (by default this process's), after ``name`` if they do not begin with a flag."""
    words = list(sys.argv[1:] if argv is None else argv)
    return [name, *words] if words and not words[0].startswith("-") else words
