"""The parser of flags that configuration classes declare: one line for each mistake, warnings through logging."""

from __future__ import annotations

import argparse
import difflib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from megatron_dwm.config.flags.declaration import Flag, declared_flags, title_of
from megatron_dwm.config.flags.values import Config, build, converter
from megatron_dwm.errors import UserError

logger = logging.getLogger(__name__)

USAGE = "%(prog)s [--flag [value ...]] ..."
_MIN_SIMILARITY = 0.78
"""Similarity from which an unknown flag is reported as a misspelling. Flags of forks resemble many flags a little."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that raises :class:`UserError` instead of printing the usage."""

    def __init__(self, *, reason_unsupported: Callable[[str], str | None] = lambda name: None, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, usage=USAGE, **kwargs)
        self.reason_unsupported = reason_unsupported

    def error(self, message: str) -> NoReturn:
        """Raise argparse's error as a UserError, with the reason if a value is refused.

        Raises:
            UserError: always.
        """
        choice = re.match(r"argument (--[\w-]+)\S*: invalid choice: '([^']*)'", message)
        if choice is not None and (reason := self.reason_unsupported("=".join(choice.groups()))):
            raise UserError(f"{' '.join(choice.groups())} is not supported: {reason}")
        raise UserError(f"{message}; see --help for the flags")

    def print_help(self, file: Any = None) -> None:
        """Print the help once: on the first rank of a program of several ranks."""
        if file is not None or not logger.isEnabledFor(logging.INFO):  # logging is not configured
            super().print_help(file)
            return
        logger.info(self.format_help().rstrip())


class _StoreFlag(argparse.Action):
    """Action that stores a flag's value; it warns if the flag is deprecated, or given twice with different values."""

    def __init__(self, item: Flag, **kwargs: Any) -> None:
        super().__init__(default=argparse.SUPPRESS, **kwargs)
        self.item = item

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the value."""
        item = self.item
        if item.value_type is not None and item.nargs is None and isinstance(values, list):
            parser.error(f"argument {option_string}: expected one argument")  # argparse has removed the value "--"
        if values == [] and item.nargs == "+":
            parser.error(f"argument {option_string}: expected at least one argument")  # the same
        value = (not item.default) if item.value_type is None else values
        if not hasattr(namespace, item.field):
            if option_string in item.old_names:
                logger.warning(f"{option_string} is deprecated; use {item.names[0]}")
            if item.deprecated is not None:
                logger.warning(f"{item.names[0]} is deprecated; {item.deprecated}")
        elif (earlier := getattr(namespace, item.field)) != value:
            logger.warning(f"{option_string} is given twice, as {_words(earlier)} and {_words(value)}; the last counts")
        setattr(namespace, item.field, value)


class _PrintFullHelp(argparse.Action):
    """Action that prints the flags of all groups, or of those that are named."""

    def __init__(self, groups: Mapping[str, type], **kwargs: Any) -> None:
        super().__init__(nargs="*", default=argparse.SUPPRESS, choices=[*groups], **kwargs)
        self.groups = groups

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Print the help and end the program."""
        full = OneLineParser(prog=parser.prog, description=parser.description, add_help=False)
        for name in values or self.groups:
            add_flags(full, self.groups[name])
        full.print_help()
        parser.exit()


def add_flags(parser: argparse.ArgumentParser, config_class: type, *, should_show: bool = True) -> None:
    """Add the flags of ``config_class`` to ``parser`` as a group named after its docstring's first line.

    A flag that is not given has no value; :func:`build` fills in the defaults.

    Args:
        should_show: whether ``--help`` shows them.
    """
    group = parser.add_argument_group(title_of(config_class))
    for item in declared_flags(config_class):
        shown = _help(item) if should_show else argparse.SUPPRESS
        for names, help_text in ((item.names, shown), (item.old_names, argparse.SUPPRESS)):
            if names:
                group.add_argument(
                    *names,
                    action=_StoreFlag,
                    item=item,
                    dest=item.field,
                    type=converter(item.value_type or str),  # a switch reads no value
                    choices=item.choices,
                    nargs=0 if item.value_type is None else item.nargs,
                    metavar=_metavar(item),
                    help=help_text,
                )


def split(
    argv: Sequence[str] | None, config_class: type[Config], *, description: str | None = None
) -> tuple[Config, list[str]]:
    """Split a command line into the flags of one class and the other arguments.

    Args:
        argv: the arguments, without the program's name; ``None`` takes ``sys.argv``.
        config_class: the configuration class that declares the flags.
        description: what ``--help`` says of the program; if not given, ``--help`` is one of the other arguments.

    Returns:
        the configuration object, and the other arguments.

    Raises:
        UserError: bad value, or the class's check failed.
    """
    parser = OneLineParser(
        description=description,
        add_help=description is not None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser, config_class)
    values, rest = parser.parse_known_args(argv)
    return build(config_class, vars(values)), rest


def read(
    argv: Sequence[str] | None,
    classes: Iterable[type],
    *,
    description: str | None,
    reason_unsupported: Callable[[str], str | None] = lambda name: None,
    main_class: type | None = None,
) -> dict[str, Any]:
    """Return the values of the flags that ``argv`` gives, by field.

    Args:
        argv: the arguments, without the program's name; ``None`` takes ``sys.argv``.
        classes: the configuration classes that declare the flags.
        description: what the program does.
        reason_unsupported: returns, for a flag that no class declares, or for ``flag=value`` with a value that its
            class does not have, why it cannot be used; None if it is unknown.
        main_class: the class whose flags ``--help`` shows, while ``--help-all`` shows the others; all if not given.

    Raises:
        UserError: unknown flag or bad value.
    """
    parser = OneLineParser(
        description=description, formatter_class=_HelpFormatter, reason_unsupported=reason_unsupported
    )
    classes = list(classes)
    for config_class in classes:
        add_flags(parser, config_class, should_show=main_class in (None, config_class))
    if main_class is not None:
        groups = {_group_name(config_class): config_class for config_class in classes}
        parser.add_argument("--help-all", action=_PrintFullHelp, groups=groups, help=argparse.SUPPRESS)
        parser.epilog = _list_groups({name: kind for name, kind in groups.items() if kind is not main_class})
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [name for config_class in classes for item in declared_flags(config_class) for name in item.names]
        raise UserError(_describe_unknown(unknown, known, reason_unsupported))
    return vars(values)


def parse(
    argv: Sequence[str] | None,
    classes: Mapping[str, type],
    *,
    description: str | None,
    reason_unsupported: Callable[[str], str | None] = lambda name: None,
    main_class: type | None = None,
    complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: given,
) -> dict[str, Any]:
    """Parse ``argv`` into one object of each class; the arguments are those of :func:`read`.

    Args:
        classes: name to configuration class.
        complete: returns the values to use, by field, from those that are given.

    Returns:
        name to configuration object.

    Raises:
        UserError: unknown or refused flag, bad value, or a configuration class's check failed.
    """
    given = read(
        argv,
        classes.values(),
        description=description,
        reason_unsupported=reason_unsupported,
        main_class=main_class,
    )
    values = complete(given)
    return {name: build(config_class, values) for name, config_class in classes.items()}


class _HelpFormatter(argparse.HelpFormatter):
    """Formatter that keeps the line breaks of the text that lists the groups."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n  " not in text:
            return super()._fill_text(text, width, indent)
        return "".join(indent + line for line in text.splitlines(keepends=True))


def _describe_unknown(
    unknown: Sequence[str], known: Sequence[str], reason_unsupported: Callable[[str], str | None]
) -> str:
    """Return the error message for words that the parser did not recognize."""
    name = unknown[0].split("=")[0]
    if not name.startswith("-"):
        return f"unexpected argument {name}: no flag before it takes this value; see --help for the flags"
    if reason := reason_unsupported(name):
        others = [word.split("=")[0] for word in unknown[1:] if reason_unsupported(word.split("=")[0])]
        also = f" (nor are {', '.join(dict.fromkeys(others))})" if others else ""
        return f"{name} is not supported: {reason}{also}"
    alike = difflib.get_close_matches(name, known, n=1, cutoff=_MIN_SIMILARITY)
    return f"unknown flag {name}; " + (f"is it {alike[0]}?" if alike else "see --help for the flags")


def _help(item: Flag) -> str:
    text = item.help
    if item.refused is not None:
        text += f" Not supported: {item.refused}."
    if item.deprecated is not None:
        text += f" Deprecated: {item.deprecated}."
    if item.value_type is not None and item.default not in (None, "", []):
        text += f" (default: {_words(item.default)})"
    return text.replace("%", "%%")


def _metavar(item: Flag) -> str | tuple[str, ...] | None:
    if item.value_type is None:
        return None
    placeholder = item.value_placeholder
    return tuple(placeholder.split()) if isinstance(item.nargs, int) else placeholder.removesuffix(" ...")


def _list_groups(groups: Mapping[str, type]) -> str:
    width = max(map(len, groups))
    rows = (
        f"  {name:{width}}  {title_of(config_class)} ({len(declared_flags(config_class))} flags)"
        for name, config_class in groups.items()
    )
    return "\n".join(
        [
            "other groups of flags:",
            *rows,
            "",
            f"--help-all shows every flag, --help-all {' '.join([*groups][:2])} those of these groups.",
        ]
    )


def _group_name(config_class: type) -> str:
    return config_class.__name__.removesuffix("Config").lower()


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
