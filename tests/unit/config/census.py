"""What the parser says of each flag and value of a census of Megatron-LM's configurations."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_dwm.config.flags import build, declared_flags, read
from megatron_dwm.config.no_effect import NoEffectConfig
from megatron_dwm.config.run import FLAG_GROUPS, PARTS
from megatron_dwm.config.unsupported_flags import reason_unsupported
from megatron_dwm.errors import UserError

CENSUS = "megatron/census.json"
"""Flags to values to the number of configurations; a switch's value is empty."""
PATH = "PATH"
"""What stands for every value that is a path."""


def refusal(name: str, value: str) -> str | None:
    """Return why the parser refuses the flag with this value, or None if it accepts it by itself."""
    try:
        given = read(
            [name, *value.split()], FLAG_GROUPS.values(), description=None, reason_unsupported=reason_unsupported
        )
        build(NoEffectConfig, given)
    except UserError as error:
        return str(error)
    for item in (item for kind in PARTS.values() for item in declared_flags(kind)):
        if item.field in given and item.refused is not None and given[item.field] != item.default:
            return f"{name} is not supported: {item.refused}"
    return None


def refused(census: Mapping[str, Mapping[str, int]]) -> dict[str, tuple[int, str]]:
    """Return each flag that is refused with a value that occurs: in how many configurations, and why."""
    found: dict[str, tuple[int, str]] = {}
    for name, values in census.items():
        reasons = {value: reason for value in values if (reason := refusal(name, value)) is not None}
        if reasons:
            found[name] = sum(values[value] for value in reasons), next(iter(reasons.values()))
    return found


def table(census: Mapping[str, Mapping[str, int]]) -> str:
    """Return one line for each refused flag, the most frequent first."""
    rows = sorted(refused(census).items(), key=lambda row: (-row[1][0], row[0]))
    return "\n".join(f"{number:5d}  {reason}" for _, (number, reason) in rows)
