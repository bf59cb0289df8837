"""Flags as fields of a configuration class."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, Union

_KEY = "flag"  # in the metadata of a field


@dataclass(frozen=True)
class _Declaration:
    """The arguments of :func:`flag`, except for the default."""

    help: str
    names: tuple[str, ...]
    old_names: tuple[str, ...]
    nargs: str | int | None
    refused: str | None
    deprecated: str | None


@dataclass(frozen=True)
class Flag:
    """A flag for the parser: its field, and how its values are read."""

    field: str
    names: tuple[str, ...]
    old_names: tuple[str, ...]
    """Spellings of earlier versions or of forks."""
    default: Any
    help: str
    value_type: type | None
    """Type of one value; None for a switch."""
    choices: tuple[Any, ...] | None
    nargs: str | int | None
    """See argparse."""
    refused: str | None
    """Why no value but the default can be used."""
    deprecated: str | None
    """What to do instead."""

    @property
    def value_placeholder(self) -> str:
        """The placeholder of the values in help texts; empty for a switch."""
        if self.value_type is None:
            return ""
        if self.choices is not None:
            name = "|".join(map(str, self.choices))
        else:
            name = {int: "N", float: "X", str: "TEXT"}[self.value_type]
        if self.nargs is None:
            return name
        return " ".join([name] * self.nargs) if isinstance(self.nargs, int) else f"{name} ..."


def flag(
    default: Any,
    help: str,
    *names: str,
    old_names: tuple[str, ...] = (),
    nargs: str | int | None = None,
    refused: str | None = None,
    deprecated: str | None = None,
) -> Any:
    """Declare a configuration field that is a flag.

    Args:
        default: value when the flag is not given. A ``True`` default makes the flag a switch that turns it off. A field
            whose type does not include its default, ``None``, must be given: its class's ``__post_init__`` requires it.
        help: one sentence for ``--help`` and ``docs/flags.md``.
        names: spellings, when they differ from ``--field-name`` (``--no-field-name`` for a ``True`` default).
        old_names: spellings of earlier versions or of forks, accepted with a warning that names the current one.
        nargs: as in argparse; list fields default to ``"+"``.
        refused: if set, giving the flag a value other than the default ends the run with this reason.
        deprecated: if set, the flag works, and giving it logs a warning with this advice.
    """
    declaration = _Declaration(help, names, old_names, nargs, refused, deprecated)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={_KEY: declaration})
    return dataclasses.field(default=default, metadata={_KEY: declaration})


def declared_flags(config_class: type) -> tuple[Flag, ...]:
    """Return the flags that ``config_class`` declares, in order."""
    return _declared_flags(config_class)


@functools.cache
def _declared_flags(config_class: type) -> tuple[Flag, ...]:
    hints = typing.get_type_hints(config_class)
    fields = [field for field in dataclasses.fields(config_class) if _KEY in field.metadata]
    return tuple(_to_flag(field, hints[field.name]) for field in fields)


def title_of(config_class: type) -> str:
    """Return the first line of the class's docstring, without its full stop."""
    return (config_class.__doc__ or config_class.__name__).strip().splitlines()[0].rstrip(".")


def flag_name(field: str) -> str:
    """Return the standard spelling of a field's flag."""
    return "--" + field.replace("_", "-")


def _to_flag(field: dataclasses.Field[Any], hint: Any) -> Flag:
    declaration: _Declaration = field.metadata[_KEY]
    is_list, value_type, choices = _read_annotation(hint)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    is_switch = value_type is bool
    standard_name = flag_name(f"no_{field.name}" if is_switch and default else field.name)
    return Flag(
        field=field.name,
        names=declaration.names or (standard_name,),
        old_names=declaration.old_names,
        default=default,
        help=declaration.help,
        value_type=None if is_switch else value_type,
        choices=choices,
        nargs=declaration.nargs or ("+" if is_list else None),
        refused=declaration.refused,
        deprecated=declaration.deprecated,
    )


def _read_annotation(hint: Any) -> tuple[bool, type, tuple[Any, ...] | None]:
    """Return ``(is a list, type of one value, choices)`` of an annotation such as ``list[str] | None``."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        (hint,) = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    is_list = typing.get_origin(hint) is list
    if is_list:
        (hint,) = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return is_list, type(choices[0]), choices
    return is_list, hint, None
