"""What the program says of each of Megatron-LM's configurations of dense GPTs, before it reads files."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_dwm.config.run import parse_run
from megatron_dwm.data.blend import data_paths
from megatron_dwm.errors import UserError
from megatron_dwm.plan.plan import with_known_layers
from megatron_dwm.plan.stages import layers_config
from tests.paths import FIXTURES

CENSUS = FIXTURES / "megatron/census.json"
"""Flags with values, and which of them each configuration has."""
CENSUS_OF_TEAMS = FIXTURES / "megatron/census_of_teams.json"
"""The same of scripts that teams have published."""
PATH = "PATH"
"""Placeholder of every value that is a path."""
FILES = ("--vocab-file", "--merge-file", "--tokenizer-model", "--tokenizer-metadata")
"""Flags whose files must exist."""
WORLD_SIZES = (8, 16, 1, 4, 64, 512)

Configuration = dict[str, str]
"""Flags and values; a switch's value is empty."""


def write_census(configurations: Iterable[Configuration], file: Path = CENSUS) -> None:
    """Write the configurations."""
    numbers: dict[tuple[str, str], int] = {}
    made_of = [[numbers.setdefault(item, len(numbers)) for item in flags.items()] for flags in configurations]
    lines = [",\n".join(json.dumps(line) for line in part) for part in (list(numbers), made_of)]
    file.write_text(f'{{"flags": [\n{lines[0]}\n],\n"configurations": [\n{lines[1]}\n]}}\n')


def read_census(file: Path = CENSUS) -> list[Configuration]:
    """Read the configurations."""
    census = json.loads(file.read_text())
    flags = [tuple(item) for item in census["flags"]]
    return [dict(flags[number] for number in numbers) for numbers in census["configurations"]]


def obstacles(flags: Mapping[str, str], file: Path) -> list[str]:
    """Return the errors, each after leaving out the flag that the one before names; none if all flags are accepted.

    Args:
        file: an existing file.
    """
    left, found = dict(flags), []
    while (error := _error(left, file)) is not None:
        found.append(error)
        named = re.search(r"--[\w-]+", error)
        if named is None or left.pop(named.group(), None) is None:
            break
    return found


def _error(flags: Mapping[str, str], file: Path) -> str | None:
    argv = ["--dwm-mode", "off"]
    for name, value in flags.items():
        argv += [name, *(str(file) if name in FILES else value).split()]
    errors = []
    for world_size in WORLD_SIZES:
        try:
            config = parse_run(argv, world_size)
            data_paths(config.data, None)
            layers_config(with_known_layers(config)[0], for_gpu=True)
        except UserError as error:
            errors.append(str(error))
        else:
            return None
    return errors[0]


def table(obstacles_of_all: Iterable[list[str]]) -> str:
    """Return one line for each error, the most frequent first."""
    counts = Counter(error for errors in obstacles_of_all for error in errors)
    return "\n".join(f"{count:5d}  {error}" for error, count in counts.most_common())
