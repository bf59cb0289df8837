"""The flag that starts the ranks of a run on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dwm.config.flags import MAX_PROCESSES, flag, require_at_least, require_at_most


@dataclass(frozen=True)
class StartConfig:
    """Start of several ranks on one machine."""

    nproc: int | None = flag(
        None,
        "Start this many ranks on this machine, without torchrun: a rank's error is then the last line on the screen, "
        "and its exit code that of the program. For pretrain_dwm.py and megatron-dwm pretrain.",
    )

    def __post_init__(self) -> None:
        require_at_least(self, 1, "nproc")
        require_at_most(self, MAX_PROCESSES, "nproc")
