"""Flags of the plan that is made of a run in place of the run."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dwm.config.flags import flag, flag_name, require_at_least
from megatron_dwm.errors import UserError


@dataclass(frozen=True)
class PlanConfig:
    """Plan of a run."""

    plan: bool = flag(
        False,
        "Do not train: check the flags, and print the run's layout, memory, operations, communication and files. It "
        "takes one process, and neither data nor a GPU.",
    )
    plan_world_size: int | None = flag(
        None, "Processes of the run that --plan is about. Default: those that are started, or --nproc."
    )
    plan_json: str | None = flag(None, "File that --plan writes the same to, as JSON.")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "plan_world_size")
        for name in ("plan_world_size", "plan_json"):
            if getattr(self, name) is not None and not self.plan:
                raise UserError(f"{flag_name(name)} {getattr(self, name)} goes with --plan; add that, or leave it out")
