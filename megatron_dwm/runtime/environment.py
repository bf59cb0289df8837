"""The rank of this process, from its environment."""

from __future__ import annotations

import os

from megatron_dwm.errors import UserError

_LAUNCHERS = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
)
"""Rank, local rank and world size as torchrun, Open MPI's mpirun, MVAPICH, srun, and the mpiexec of MPICH and Intel set
them, in order of precedence."""
_REMEDY = "start the run with torchrun, srun or mpirun"


def environment_rank() -> tuple[int, int, int]:
    """Return ``(rank, local rank, world size)`` from a launcher's variables; ``(0, 0, 1)`` without a launcher.

    Raises:
        UserError: a variable is not an integer, or one of torchrun's is missing.
    """
    for rank_name, local_name, size_name in _LAUNCHERS:
        # A shell inside an sbatch job also has SLURM_* set: only a step started by srun counts.
        if rank_name.startswith("SLURM_") and "SLURM_STEP_ID" not in os.environ:
            continue
        # Both from one launcher: an image may have WORLD_SIZE set, and if that were combined with another launcher's
        # rank, each process could train alone.
        if rank_name in os.environ and size_name in os.environ:
            return _integer(rank_name), _integer(local_name), _integer(size_name)
    for name, other, alone in (("RANK", "WORLD_SIZE", 0), ("WORLD_SIZE", "RANK", 1)):
        if name in os.environ and _integer(name) != alone:
            raise UserError(f"{name}={os.environ[name]} without {other}; set both, or {_REMEDY}")
    return 0, 0, 1


def _integer(name: str) -> int:
    value = os.environ.get(name, "0")
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{name}={value}: not an integer; {_REMEDY}") from None
