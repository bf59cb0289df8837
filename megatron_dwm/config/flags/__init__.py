"""Command-line flags from dataclasses.

A configuration class declares each flag once, as a field made by :func:`flag`: its default, its help and, where the
flag's name does not follow from the field's, its spelling. The parser, the configuration object and ``docs/flags.md``
all come from that one declaration.
"""

from megatron_dwm.config.flags.declaration import Flag, declared_flags, flag, flag_name, title_of
from megatron_dwm.config.flags.parser import parse, read, split
from megatron_dwm.config.flags.values import (
    MAX_LAYERS,
    MAX_PROCESSES,
    build,
    require_at_least,
    require_at_most,
    require_given,
    require_paths,
    to_argv,
)

__all__ = [
    "MAX_LAYERS",
    "MAX_PROCESSES",
    "Flag",
    "build",
    "declared_flags",
    "flag",
    "flag_name",
    "parse",
    "read",
    "require_at_least",
    "require_at_most",
    "require_given",
    "require_paths",
    "split",
    "title_of",
    "to_argv",
]
