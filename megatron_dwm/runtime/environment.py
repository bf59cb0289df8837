"""The rank of this process, from its environment."""

from __future__ import annotations

import os

from megatron_dwm.errors import UserError

_VARIABLES = {
    "rank": ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK"),
    "local rank": ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "MPI_LOCALRANKID"),
    "world size": ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS", "PMI_SIZE"),
}
"""What torchrun, Open MPI's mpirun, srun, and the mpiexec of MPICH and Intel set, in the order in which they count."""


def environment_rank() -> tuple[int, int, int]:
    """Return ``(rank, local rank, world size)`` from a launcher's variables; a lone process is ``(0, 0, 1)``.

    Raises:
        UserError: a variable is not a whole number.
    """
    return _integer("rank", 0), _integer("local rank", 0), _integer("world size", 1)


def _integer(kind: str, default: int) -> int:
    for name in _VARIABLES[kind]:
        # A shell inside an sbatch job also has SLURM_* set: only a step started by srun counts.
        if name not in os.environ or (name.startswith("SLURM_") and "SLURM_STEP_ID" not in os.environ):
            continue
        try:
            return int(os.environ[name])
        except ValueError:
            raise UserError(
                f"{name}={os.environ[name]}: not a whole number; start the run with torchrun, srun or mpirun"
            ) from None
    return default
