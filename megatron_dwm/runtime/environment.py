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
        UserError: a variable is not an integer, a local rank is negative, or one of a launcher's variables is missing.
    """
    # A shell inside an sbatch job also has SLURM_* set: only a step started by srun counts.
    is_step = "SLURM_STEP_ID" in os.environ
    launchers = [names for names in _LAUNCHERS if is_step or not names[0].startswith("SLURM_")]
    for rank_name, local_name, size_name in launchers:
        # Both from one launcher: an image may have WORLD_SIZE set, and if that were combined with another launcher's
        # rank, each process could train alone.
        if rank_name in os.environ and size_name in os.environ:
            if (local_rank := _integer(local_name)) < 0:
                raise UserError(f"{local_name}={local_rank}: a rank is not negative; {_REMEDY}")
            return _integer(rank_name), local_rank, _integer(size_name)
    for rank_name, _, size_name in launchers:
        for name, other, alone in ((rank_name, size_name, 0), (size_name, rank_name, 1)):
            if name in os.environ and _integer(name) != alone:
                raise UserError(f"{name}={os.environ[name]} without {other}; set both, or {_REMEDY}")
    return 0, 0, 1


def _integer(name: str) -> int:
    value = os.environ.get(name, "0")
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{name}={value}: not an integer; {_REMEDY}") from None
