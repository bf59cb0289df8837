"""Flags of a benchmark; unknown flags are passed to the runs that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from megatron_dwm.config.flags import read, split
from megatron_dwm.config.run import FLAG_GROUPS, RunConfig
from megatron_dwm.config.unsupported_flags import reason_unsupported

Config = TypeVar("Config")


def parse_benchmark(
    config_class: type[Config], argv: Sequence[str] | None, description: str | None
) -> tuple[Config, list[str]]:
    """Parse the flags of a benchmark.

    Args:
        config_class: the benchmark's flags.
        argv: the arguments; None takes those of this process.
        description: what ``--help`` says of the benchmark.

    Returns:
        the benchmark's configuration, and the arguments that are not its own, for ``pretrain_dwm.py``.

    Raises:
        UserError: an unknown flag, or one with a bad value.
    """
    options, rest = split(argv, config_class, description=description or "")
    # Before any data is built: the runs would find it one by one, and late.
    read(rest, FLAG_GROUPS.values(), description=None, reason_unsupported=reason_unsupported)
    return options, rest


def without_files(config: RunConfig) -> RunConfig:
    """Return a run that saves and records nothing."""
    logging = replace(config.logging, metrics_jsonl=None, tensorboard_dir=None, wandb_project=None)
    return replace(config, checkpoint=replace(config.checkpoint, save=None), logging=logging)


def override(defaults: Sequence[str], given: Sequence[str]) -> list[str]:
    """Return the flags of a run: ``given``, after those of ``defaults`` that it does not name."""
    named = {word.split("=")[0] for word in given if word.startswith("--")}
    kept: list[str] = []
    is_kept = True
    for word in defaults:
        if word.startswith("--"):
            is_kept = word.split("=")[0] not in named
        if is_kept:
            kept.append(word)
    return [*kept, *given]
