"""Ranks of processes that torchrun, mpirun, mpiexec and srun start."""

from __future__ import annotations

import pytest

from megatron_dwm.errors import UserError
from megatron_dwm.runtime.environment import environment_rank

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "6", "OMPI_COMM_WORLD_LOCAL_RANK": "2", "OMPI_COMM_WORLD_SIZE": "16"}
SRUN = {"SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NTASKS": "4"}
MVAPICH = {"MV2_COMM_WORLD_RANK": "4", "MV2_COMM_WORLD_LOCAL_RANK": "0", "MV2_COMM_WORLD_SIZE": "5"}
MPICH = {"PMI_RANK": "1", "MPI_LOCALRANKID": "0", "PMI_SIZE": "2"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [*TORCHRUN, *OPEN_MPI, *MVAPICH, *SRUN, *MPICH, "SLURM_STEP_ID"]:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 0, 1)),
        (TORCHRUN, (5, 1, 8)),
        (OPEN_MPI, (6, 2, 16)),
        (MVAPICH, (4, 0, 5)),
        (MPICH, (1, 0, 2)),
        ({"WORLD_SIZE": "1"} | OPEN_MPI, (6, 2, 16)),  # set in a container's image
        ({"WORLD_SIZE": "1"}, (0, 0, 1)),
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


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "many"},
            "OMPI_COMM_WORLD_SIZE=many: not an integer",
        ),
        ({"RANK": "1"}, "RANK=1 without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK"),
        ({"PMI_RANK": "3"}, "PMI_RANK=3 without PMI_SIZE"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}, "SLURM_PROCID=1 without SLURM_NTASKS"),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1: a rank is not negative"),
    ],
)
def test_what_makes_no_rank_is_named(environment: pytest.MonkeyPatch, variables: dict[str, str], said: str):
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(UserError, match=f"^{said}"):
        environment_rank()
