"""Values of flags: parsing, building of configurations, checks, and conversion back to a command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from megatron_dwm.config.flags.declaration import declared_flags, flag_name
from megatron_dwm.errors import UserError

Config = TypeVar("Config")

LARGEST_INTEGER = 2**63 - 1
"""The largest 64-bit integer, which tensors, index files and checkpoints can hold."""
MAX_LAYERS = 10_000
"""More layers than any model has; building them would fill the memory."""
MAX_PROCESSES = 1024
"""Largest number of processes or threads on one machine; more are certainly a mistake."""


def build(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a ``config_class`` from those of ``values`` that are its fields, and from defaults for the rest.

    Raises:
        UserError: a refused flag was given, or the class's checks fail.
    """
    known: dict[str, Any] = {}
    for item in declared_flags(config_class):
        if item.field not in values:
            continue
        value = values[item.field]
        if item.refused is not None and value != item.default:
            raise UserError(f"{item.names[0]} is not supported: {item.refused}")
        known[item.field] = value
    return config_class(**known)


def to_argv(config: Any) -> list[str]:
    """Return the command line for ``config``: the flags that differ from their defaults."""
    argv: list[str] = []
    for item in declared_flags(type(config)):
        value = getattr(config, item.field)
        if value == item.default:
            continue
        argv.append(item.names[0])
        if item.value_type is not None:
            argv += map(str, value if isinstance(value, list) else [value])
    return argv


def require_given(config: Any, fields: str, remedy: str) -> None:
    """Check that fields of a configuration have a value: not None, and neither an empty text nor an empty list.

    Args:
        fields: names of fields, separated by blanks.
        remedy: what to give, for the message.

    Raises:
        UserError: one has none.
    """
    for field in fields.split():
        if getattr(config, field) in (None, "", []):
            raise UserError(f"{_spelling(config, field)} is missing; {remedy}")


def require_at_least(config: Any, minimum: float, fields: str) -> None:
    """Check that numbers of a configuration are at least ``minimum``; None is accepted.

    Args:
        fields: names of fields, separated by blanks.

    Raises:
        UserError: one is less than ``minimum``, or not a number.
    """
    for field in fields.split():
        value = getattr(config, field)
        if value is not None and not value >= minimum:
            raise UserError(f"{_spelling(config, field)} {value}: must be at least {minimum}")


def require_at_most(config: Any, maximum: float, fields: str) -> None:
    """Check that numbers of a configuration are at most ``maximum``; None is accepted.

    Args:
        fields: names of fields, separated by blanks.

    Raises:
        UserError: one is larger.
    """
    for field in fields.split():
        value = getattr(config, field)
        if value is not None and value > maximum:
            raise UserError(f"{_spelling(config, field)} {value}: must be at most {maximum}")


def require_paths(config: Any, fields: str, *, allow_urls: bool = False) -> None:
    """Check that paths of a configuration are complete and on this machine; None is accepted.

    A shell does not replace the ``~`` in ``--save=~/run`` or a variable between single quotes, and replaces an unset
    variable by nothing. Files would then be written to a folder named ``~`` or ``$NAME``, or to the current folder.

    Args:
        fields: names of fields, separated by blanks.
        allow_urls: whether they may be URLs.

    Raises:
        UserError: one is empty, begins with ``~`` or ``$``, or is a URL.
    """
    for field in fields.split():
        path, name = getattr(config, field), _spelling(config, field)
        if path is not None and not path.strip():
            raise UserError(f"{name} '{path}' is empty; give a path, or leave it out")
        if path is not None and path[0] in "~$":
            raise UserError(
                f"{name} {path}: the shell has not replaced {path[0]}; write the path out, or begin with ./"
            )
        if path is not None and "://" in path and not allow_urls:
            raise UserError(f"{name} {path} is a URL; give a path on this machine")


def _spelling(config: Any, field: str) -> str:
    return next((item.names[0] for item in declared_flags(type(config)) if item.field == field), flag_name(field))


def converter(value_type: type) -> Callable[[str], Any]:
    """Return the function that reads a value of ``value_type`` from a word, for argparse."""
    return {int: _to_int, float: _to_float, str: _to_text}[value_type]


def _to_int(word: str) -> int:
    try:
        value = int(word)
    except ValueError:  # also a number of more digits than Python reads
        raise argparse.ArgumentTypeError(f"invalid int value: {word!r}") from None
    if abs(value) > LARGEST_INTEGER:
        raise argparse.ArgumentTypeError(f"{word} is too large; give at most {LARGEST_INTEGER}")
    return value


def _to_float(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid float value: {word!r}") from None
    # Comparisons with NaN are all false, so that it would pass most checks and be trained with.
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{word} is not a finite number")
    return value


def _to_text(word: str) -> str:
    try:
        word.encode()
    except UnicodeEncodeError:  # Python lets such bytes through, until they are printed or written to a file
        raise argparse.ArgumentTypeError(f"{word!a} is not UTF-8; rename it") from None
    return word
