"""Command-line flags from dataclasses.

A configuration class declares each flag once, as a field made by :func:`flag`: its default, its help and, where
the flag's name does not follow from the field's, its spelling. The parser, the configuration object and
``docs/flags.md`` all come from that one declaration.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeVar, Union

from megatron_dwm.errors import UserError

Config = TypeVar("Config")

_META = "flag"


@dataclasses.dataclass(frozen=True)
class FlagInfo:
    """How one field is spelled on the command line."""

    help: str
    names: tuple[str, ...] = ()
    nargs: str | int | None = None
    refused: str | None = None  # why the flag is recognized but cannot be used
    deprecated: str | None = None  # what to do instead
    old_names: tuple[str, ...] = ()  # spellings of earlier versions


def flag(
    default: Any,
    help: str,
    *names: str,
    nargs: str | int | None = None,
    refused: str | None = None,
    deprecated: str | None = None,
    old_names: tuple[str, ...] = (),
) -> Any:
    """Declare a configuration field that is a flag.

    Args:
        default: value when the flag is not given. A ``True`` default makes the flag a switch that turns it off.
        help: one sentence; it ends up in ``--help`` and in ``docs/flags.md``.
        names: spellings, when they differ from ``--field-name`` (``--no-field-name`` for a ``True`` default).
        nargs: as in argparse; list fields default to ``"+"``.
        refused: if set, giving the flag a value other than the default ends the run with this reason.
        deprecated: if set, the flag works as ever and giving it prints a line that says to do this instead.
        old_names: spellings of earlier versions, accepted with a line that names the present one.
    """
    info = FlagInfo(help=help, names=names, nargs=nargs, refused=refused, deprecated=deprecated, old_names=old_names)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={_META: info})
    return dataclasses.field(default=default, metadata={_META: info})


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag as the parser sees it: the field it fills and how its values are read."""

    field: str
    names: tuple[str, ...]
    default: Any
    help: str
    value_type: type | None  # None for a switch
    choices: tuple[Any, ...] | None
    nargs: str | int | None
    refused: str | None
    deprecated: str | None
    old_names: tuple[str, ...]


def declared_flags(config_class: type) -> list[Flag]:
    """The flags that ``config_class`` declares, in order."""
    hints = typing.get_type_hints(config_class)
    return [_flag_of(field, hints[field.name]) for field in dataclasses.fields(config_class) if _META in field.metadata]


def _flag_of(field: dataclasses.Field[Any], hint: Any) -> Flag:
    info: FlagInfo = field.metadata[_META]
    is_list, value_type, choices = _value_type(hint)
    default = field.default
    if default is dataclasses.MISSING:
        assert field.default_factory is not dataclasses.MISSING
        default = field.default_factory()
    dashed = field.name.replace("_", "-")
    standard = f"--no-{dashed}" if value_type is bool and default else f"--{dashed}"
    return Flag(
        field=field.name,
        names=info.names or (standard,),
        default=default,
        help=info.help,
        value_type=None if value_type is bool else value_type,
        choices=choices,
        nargs=info.nargs or ("+" if is_list else None),
        refused=info.refused,
        deprecated=info.deprecated,
        old_names=info.old_names,
    )


def _value_type(hint: Any) -> tuple[bool, type, tuple[Any, ...] | None]:
    """``(is a list, type of one value, choices)`` of an annotation such as ``list[str] | None``."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        (hint,) = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    is_list = typing.get_origin(hint) is list
    if is_list:
        (hint,) = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return is_list, type(choices[0]), choices
    return is_list, hint, None


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are :class:`UserError`, not a usage screen."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help for the flags")


def add_flags(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Add the flags of ``config_class`` to ``parser`` as a group named after its docstring's first line.

    A flag that is not given leaves no value: :func:`build` knows the defaults.
    """
    group = parser.add_argument_group(title_of(config_class))
    for item in declared_flags(config_class):
        help_text = item.help.replace("%", "%%")
        if item.value_type is None:
            action = "store_false" if item.default else "store_true"
            group.add_argument(*item.names, dest=item.field, action=action, default=argparse.SUPPRESS, help=help_text)
        else:
            group.add_argument(
                *item.names,
                dest=item.field,
                type=item.value_type,
                choices=item.choices,
                nargs=item.nargs,
                default=argparse.SUPPRESS,
                help=help_text,
                metavar=None if item.choices else item.value_type.__name__.upper(),
            )


def title_of(config_class: type) -> str:
    """The first line of the class's docstring."""
    return (config_class.__doc__ or config_class.__name__).strip().splitlines()[0].rstrip(".")


def build(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """Make a ``config_class`` of those of ``values`` that are its own, and defaults for the rest.

    Raises:
        UserError: a refused flag was given, or the class's own checks fail.
    """
    own: dict[str, Any] = {}
    for item in declared_flags(config_class):
        if item.field not in values:
            continue
        value = values[item.field]
        if item.refused is not None and value != item.default:
            raise UserError(f"{item.names[0]} is not supported: {item.refused}")
        own[item.field] = value
    return config_class(**own)


def read(
    argv: Sequence[str] | None,
    classes: Iterable[type],
    *,
    prog: str | None = None,
    description: str | None,
    reason_unsupported: Callable[[str], str | None] = lambda name: None,
) -> dict[str, Any]:
    """The values of the flags that ``argv`` gives, by field.

    Args:
        argv: the arguments, without the program's name; ``None`` takes ``sys.argv``.
        classes: the configuration classes whose flags there are.
        reason_unsupported: tells of a flag that no class declares why it cannot be used, or None if it is unknown.

    Raises:
        UserError: unknown flag or bad value.
    """
    classes = list(classes)
    parser = OneLineParser(prog=prog, description=description)
    for config_class in classes:
        add_flags(parser, config_class)
    values, unknown = parser.parse_known_args(_present_names(argv, renamed_flags(classes)))
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("-"):
            raise UserError(f"unexpected argument {name}; the flag before it takes no such value, see --help")
        if reason := reason_unsupported(name):
            others = [word.split("=")[0] for word in unknown[1:] if reason_unsupported(word.split("=")[0])]
            also = f" (nor are {', '.join(dict.fromkeys(others))})" if others else ""
            raise UserError(f"{name} is not supported: {reason}{also}")
        alike = difflib.get_close_matches(name, parser._option_string_actions, n=1)
        raise UserError(f"unknown flag {name}; " + (f"is it {alike[0]}?" if alike else "see --help for the flags"))
    return vars(values)


def renamed_flags(classes: Iterable[type]) -> dict[str, str]:
    """Spellings of earlier versions, with the present ones."""
    return {old: item.names[0] for kind in classes for item in declared_flags(kind) for old in item.old_names}


def _present_names(argv: Sequence[str] | None, renamed: Mapping[str, str]) -> list[str]:
    """``argv`` (``sys.argv`` for None) with the present spelling of each flag."""
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        name, equals, value = word.partition("=")
        words.append(renamed.get(name, name) + equals + value)
    return words


def to_argv(config: Any) -> list[str]:
    """The command line that makes ``config``: those of its flags that are not at their defaults."""
    argv: list[str] = []
    for item in declared_flags(type(config)):
        value = getattr(config, item.field)
        if value == item.default:
            continue
        argv.append(item.names[0])
        if item.value_type is not None:
            argv += map(str, value if isinstance(value, list) else [value])
    return argv


def flag_name(field: str) -> str:
    """The standard spelling of a field's flag."""
    return "--" + field.replace("_", "-")


def require_at_least(config: Any, least: float, fields: str) -> None:
    """Check numbers of a configuration; those that are None pass.

    Args:
        fields: names of fields, separated by blanks.

    Raises:
        UserError: one is less than ``least``.
    """
    for field in fields.split():
        value = getattr(config, field)
        if value is not None and not value >= least:
            raise UserError(f"{flag_name(field)} {value}: must be at least {least}")


def deprecations(classes: Iterable[type], given: Iterable[str], argv: Sequence[str] = ()) -> list[str]:
    """A line for each deprecated flag among the ``given`` fields, and for each old spelling in ``argv``."""
    words = {word.split("=")[0] for word in argv}
    return [
        f"warning: {old} is deprecated; use {new}" for old, new in renamed_flags(classes).items() if old in words
    ] + [
        f"warning: {item.names[0]} is deprecated; {item.deprecated}"
        for config_class in classes
        for item in declared_flags(config_class)
        if item.deprecated is not None and item.field in given
    ]


def parse(
    argv: Sequence[str] | None,
    classes: Mapping[str, type],
    *,
    prog: str | None = None,
    description: str | None,
    reason_unsupported: Callable[[str], str | None] = lambda name: None,
    complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: given,
    speaks: bool = True,
) -> dict[str, Any]:
    """Parse ``argv`` into one object of each class; the arguments are those of :func:`read`.

    Args:
        classes: name to configuration class.
        complete: makes of the values that are given, by field, those to use.
        speaks: whether this process prints warnings; of several that parse alike, one should.

    Returns:
        name to configuration object.

    Raises:
        UserError: unknown or refused flag, bad value, or a configuration class's check failed.
    """
    given = read(argv, classes.values(), prog=prog, description=description, reason_unsupported=reason_unsupported)
    values = complete(given)
    configs: dict[str, Any] = {name: build(config_class, values) for name, config_class in classes.items()}
    if speaks:
        for line in deprecations(classes.values(), given, sys.argv[1:] if argv is None else argv):
            print(line, file=sys.stderr)
    return configs
