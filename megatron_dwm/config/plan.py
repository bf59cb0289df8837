"""Flags of ``--plan``, which prints the plan of a run instead of running it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dwm.config.flags import flag, flag_name, require_at_least, require_paths
from megatron_dwm.errors import UserError


@dataclass(frozen=True)
class PlanConfig:
    """Plan of a run."""

    plan: bool = flag(
        False,
        "Do not train; check the flags, and print the run's layout, memory, operations, communication and files. Needs "
        "one process, and neither data nor a GPU.",
    )
    plan_world_size: int | None = flag(
        None, "Number of processes of the run that --plan describes. Default: --nproc, or those that were started."
    )
    plan_json: str | None = flag(None, "JSON file to which --plan also writes its results.")

    def __post_init__(self) -> None:
        require_paths(self, "plan_json")
        require_at_least(self, 1, "plan_world_size")
        for name in ("plan_world_size", "plan_json"):
            if getattr(self, name) is not None and not self.plan:
                raise UserError(f"{flag_name(name)} {getattr(self, name)} has no effect without --plan; add that")
