"""What this process learns from its environment: its rank, and the libraries that are installed."""

from __future__ import annotations

import os

from megatron_dwm.errors import UserError


def environment_rank() -> tuple[int, int, int]:
    """``(rank, local rank, world size)`` from torchrun's or srun's variables; a lone process is ``(0, 0, 1)``.

    torchrun sets RANK, LOCAL_RANK and WORLD_SIZE; srun sets SLURM_PROCID, SLURM_LOCALID and SLURM_NTASKS.

    Raises:
        UserError: a variable is not a whole number.
    """
    return (
        _integer("RANK", "SLURM_PROCID", 0),
        _integer("LOCAL_RANK", "SLURM_LOCALID", 0),
        _integer("WORLD_SIZE", "SLURM_NTASKS", 1),
    )


def _integer(name: str, slurm_name: str, default: int) -> int:
    # A shell inside an sbatch job also has SLURM_* set: only a step started by srun counts.
    in_step = "SLURM_STEP_ID" in os.environ
    text = os.environ.get(name, os.environ.get(slurm_name) if in_step else None)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text}: not a whole number; start the run with torchrun or srun") from None


def require_megatron_core() -> None:
    """Refuse a megatron-core other than the 0.16 series, whose interfaces and checkpoints this program is made for.

    Raises:
        UserError: it is missing or of another version.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("megatron-core")
    except PackageNotFoundError:
        raise UserError("megatron-core is not installed; pip install 'megatron-core>=0.16,<0.17'") from None
    if not found.startswith("0.16."):
        raise UserError(f"megatron-core {found} is installed; pip install 'megatron-core>=0.16,<0.17'")
