"""Write docs/flags.md, the list of pretrain_dwm.py's flags, from the configuration classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_dwm.atomic_write import atomic_write_text
from megatron_dwm.config.flags import Flag, declared_flags, flag, parse, title_of
from megatron_dwm.config.no_effect import OTHER_FIELDS_WITHOUT_EFFECT, NoEffectConfig
from megatron_dwm.config.run import FLAG_GROUPS
from megatron_dwm.config.unsupported_flags import UNSUPPORTED
from megatron_dwm.errors import run_cli

PAGE = Path(__file__).resolve().parent.parent / "docs" / "flags.md"
INTRODUCTION = """\
# Flags of pretrain_dwm.py

Names, meaning and defaults are those of Megatron-LM (core_v0.16.1), but for the flags of our own. Flags that came with
Megatron-LM 0.17 to 0.19 are known too. The column *Origin*
says which is which: *Megatron-LM*, *ours*, or *no effect* for a flag of Megatron-LM's, of an older one or of a fork
that is accepted because what it asks for happens in any case. This page is written by `python tools/write_flags.py`
from the classes in `megatron_dwm/config/`, where a flag is declared once; edit there.

A switch has no value and its default is *off*. A flag that is not in these tables ends the run, with
the reason given under [Not supported](#not-supported).
"""
OWN_FLAGS = {
    "--eval-tasks",
    "--eval-tasks-interval",
    "--eval-tasks-text",
    "--eval-tasks-num-fewshot",
    "--eval-tasks-limit",
    "--metrics-jsonl",
    "--no-checkpoint-checksums",
    "--plan",
    "--plan-json",
    "--plan-world-size",
}
"""Ours, besides those that start with ``--dwm-``."""


@dataclass(frozen=True)
class WriteFlagsConfig:
    """What to do."""

    check: bool = flag(False, "Write nothing; exit with code 1 if the page is not what would be written.")


def render() -> str:
    """Return the page."""
    sections = [INTRODUCTION]
    for config_class in FLAG_GROUPS.values():
        rows = "".join(_row(item, _origin(item, config_class)) for item in declared_flags(config_class))
        sections.append(
            f"## {title_of(config_class)}\n\n| Flag | Default | Origin | Meaning |\n|---|---|---|---|\n{rows}"
        )
    rows = "".join(
        f"| {_sentence(reason)} | {' '.join(f'`{name}`' for name in names.split())} |\n"
        for reason, names in UNSUPPORTED.items()
    )
    sections.append(f"## Not supported\n\n| Why | Flags |\n|---|---|\n{rows}")
    return "\n".join(sections)


def _origin(item: Flag, config_class: type) -> str:
    if config_class is NoEffectConfig or item.field in OTHER_FIELDS_WITHOUT_EFFECT:
        return "no effect"
    is_ours = any(name.startswith("--dwm-") or name in OWN_FLAGS for name in item.names)
    return "ours" if is_ours else "Megatron-LM"


def _row(item: Flag, origin: str) -> str:
    if item.value_type is None:
        value, default = "", "*off*"
    else:
        value = " " + item.value_placeholder.replace("|", "\\|")
        default = "" if item.default is None else f"`{item.default}`"
    names = ", ".join(f"`{name}`" for name in item.names)
    meaning = item.help
    if item.refused is not None:
        meaning += f" **Not supported:** {item.refused}."
    if item.deprecated is not None:
        meaning += f" **Deprecated:** {item.deprecated}."
    if item.old_names:
        meaning += f" **Deprecated:** {', '.join(f'`{name}`' for name in item.old_names)}, its earlier name."
    return f"| {names}{value} | {default} | {origin} | {meaning} |\n"


def _sentence(reason: str) -> str:
    return f"{reason[0].upper()}{reason[1:]}."


def main() -> None:
    """Write the page, or check it."""
    config: WriteFlagsConfig = parse(None, {"write": WriteFlagsConfig}, description=__doc__)["write"]
    page = render()
    if config.check:
        if not PAGE.is_file() or PAGE.read_text() != page:
            raise SystemExit(f"{PAGE} is stale; run python tools/write_flags.py")
        return
    atomic_write_text(PAGE, page)
    print(f"{PAGE}: {page.count(chr(10))} lines")


if __name__ == "__main__":
    run_cli(main)
