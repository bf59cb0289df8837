"""Write docs/flags.md, the list of pretrain_dwm.py's flags, from the configuration classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_dwm.atomic_write import atomic_write_text
from megatron_dwm.config.flags import Flag, declared_flags, flag, parse, title_of
from megatron_dwm.config.run import PARTS
from megatron_dwm.config.unsupported_flags import UNSUPPORTED
from megatron_dwm.errors import run_cli

PAGE = Path(__file__).resolve().parent.parent / "docs" / "flags.md"
INTRODUCTION = """\
# Flags of pretrain_dwm.py

Names, meaning and defaults are those of Megatron-LM (core_v0.16.1); `--dwm-*` and `--metrics-jsonl` are ours. This
page is written by `python tools/write_flags.py` from the classes in `megatron_dwm/config/`, where a flag is declared
once; edit there.

A switch has no value and its default is *off*. A flag of Megatron-LM's that is not in these tables ends the run with
the reason given under [Not supported](#not-supported).
"""


@dataclass(frozen=True)
class WriteFlagsConfig:
    """What to do."""

    check: bool = flag(False, "Write nothing; exit with code 1 if the page is not what would be written.")


def render() -> str:
    """Return the page."""
    sections = [INTRODUCTION]
    for config_class in PARTS.values():
        rows = "".join(_row(item) for item in declared_flags(config_class))
        sections.append(f"## {title_of(config_class)}\n\n| Flag | Default | Meaning |\n|---|---|---|\n{rows}")
    rows = "".join(
        f"| {_sentence(reason)} | {' '.join(f'`{name}`' for name in names.split())} |\n"
        for reason, names in UNSUPPORTED.items()
    )
    sections.append(f"## Not supported\n\n| Why | Flags |\n|---|---|\n{rows}")
    return "\n".join(sections)


def _row(item: Flag) -> str:
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
    return f"| {names}{value} | {default} | {meaning} |\n"


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


if __name__ == "__main__":
    run_cli(main)
