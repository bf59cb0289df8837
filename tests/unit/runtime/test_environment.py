"""Ranks of processes that torchrun, mpirun, mpiexec and srun start."""

from __future__ import annotations

import pytest

from megatron_dwm.errors import UserError
from megatron_dwm.runtime.environment import environment_rank

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "6", "OMPI_COMM_WORLD_LOCAL_RANK": "2", "OMPI_COMM_WORLD_SIZE": "16"}
SRUN = {"SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NTASKS": "4"}
MPICH = {"PMI_RANK": "1", "MPI_LOCALRANKID": "0", "PMI_SIZE": "2"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [*TORCHRUN, *OPEN_MPI, *SRUN, *MPICH, "SLURM_STEP_ID"]:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 0, 1)),
        (TORCHRUN, (5, 1, 8)),
        (OPEN_MPI, (6, 2, 16)),
        (MPICH, (1, 0, 2)),
        (SRUN | {"SLURM_STEP_ID": "0"}, (3, 3, 4)),
        (SRUN, (0, 0, 1)),  # a shell inside a job, which is no step
        (SRUN | {"SLURM_STEP_ID": "0"} | TORCHRUN, (5, 1, 8)),  # torchrun that srun starts
        (SRUN | {"SLURM_STEP_ID": "0"} | OPEN_MPI, (6, 2, 16)),  # mpirun that starts its daemons with srun
    ],
)
def test_the_launchers_variables_give_the_rank(
    environment: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[int, int, int]
):
    for name, value in variables.items():
        environment.setenv(name, value)
    assert environment_rank() == expected


def test_a_variable_that_is_no_number_is_named(environment: pytest.MonkeyPatch):
    environment.setenv("OMPI_COMM_WORLD_SIZE", "many")
    with pytest.raises(UserError, match=r"^OMPI_COMM_WORLD_SIZE=many: not a whole number"):
        environment_rank()
