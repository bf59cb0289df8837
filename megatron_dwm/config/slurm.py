"""Flags for running tasks on a SLURM cluster instead of this machine."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dwm.config.flags import flag, require_at_least
from megatron_dwm.errors import UserError


@dataclass(frozen=True)
class SlurmConfig:
    """SLURM."""

    slurm_partition: str | None = flag(
        None, "Submit the tasks to this SLURM partition as job arrays, instead of running them on this machine."
    )
    slurm_time: str = flag("24:00:00", "Time limit of a SLURM task.")
    slurm_gpus_per_task: int = flag(0, "GPUs of a SLURM task.")
    slurm_memory_gb: int = flag(4, "Memory of a SLURM task, in GB.")
    slurm_options: list[str] | None = flag(None, "Further options of sbatch: account=NAME qos=NAME ...")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "slurm_memory_gb")
        require_at_least(self, 0, "slurm_gpus_per_task")
        self.sbatch_options()

    def sbatch_options(self) -> dict[str, str]:
        """Return the values of --slurm-options by name.

        Raises:
            UserError: one has no name or no value.
        """
        pairs = [option.partition("=") for option in self.slurm_options or ()]
        for (name, equals, _), option in zip(pairs, self.slurm_options or (), strict=True):
            if not name or not equals:
                raise UserError(f"--slurm-options {option}: give NAME=VALUE, e.g. account=mine")
        return {name.lstrip("-"): value for name, _, value in pairs}
