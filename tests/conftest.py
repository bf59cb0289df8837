"""What every test shares: the CPU, one thread, quiet third-party libraries, and markers."""

from __future__ import annotations

import functools
import gc
import importlib.util
import itertools
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

# Tests run on the CPU whatever the machine has: results are then the same everywhere, and forking stays safe. Those of
# tests/gpu/ start programs that see the GPUs.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import xdist

import megatron_dwm  # noqa: F401  before megatron-core, as in every command
from tests.paths import ROOT

# The garbage collector ignores objects from before the tests and before a fork: to visit them takes half a second each
# time, and copies a fork's memory. megatron-core collects at every checkpoint.
os.register_at_fork(after_in_child=gc.freeze)
# Of what tests allocate, little is garbage, and looking for it after every 700 objects took a tenth of their time.
gc.set_threshold(50_000, 20, 100)

REQUIRE_ALL = "REQUIRE_ALL_TESTS"
"""Environment variable that makes tests fail, in place of being deselected, where their programs are not installed."""
FOLDERS = ("unit", "distributed", "e2e", "gpu")
"""Folders whose tests carry the folder's name as a marker."""
PROGRAMS = {"slurm": ("munged", "slurmctld", "slurmd", "sbatch", "srun"), "browser": ("chromium",)}
"""Programs that the tests of a marker start."""
PACKAGES = {"slurm": "slurm-wlm munge", "browser": "chromium"}
"""Debian's packages of these programs."""
GPUS_NEEDED = {"gpu": 1, "gpus": 2, "three_gpus": 3}
"""GPUs that the tests of a marker need; without them they are deselected in any case."""
FIXTURES = {
    "cluster": "slurm",
    "browser": "browser",
    "one_gpu": "gpu",
    "two_gpus": "gpus",
    "three_gpus": "three_gpus",
    "transformer_engine": "transformer_engine",
}
"""Markers of the tests that use a fixture."""


@functools.cache
def mock_documents() -> int:
    """Return the number of megatron-core's mock documents; the first call must come before it is changed."""
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset

    return MockGPTLowLevelDataset.size


@functools.cache
def count_gpus() -> int:
    """Return how many NVIDIA GPUs this machine has."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return listed.stdout.count("GPU ")


def missing_gpus() -> dict[str, str]:
    """Return the markers of tests that need more GPUs than there are, or Transformer Engine, and what is missing."""
    missing = {
        marker: f"this machine does not have {count} NVIDIA GPU(s)"
        for marker, count in GPUS_NEEDED.items()
        if count > count_gpus()
    }
    if importlib.util.find_spec("transformer_engine") is None:
        missing["transformer_engine"] = "it is not installed"
    return missing


@pytest.fixture
def one_gpu() -> None:
    """Mark a test that needs a GPU."""


@pytest.fixture
def two_gpus() -> None:
    """Mark a test that needs two GPUs."""


@pytest.fixture
def three_gpus() -> None:
    """Mark a test that needs three GPUs."""


@pytest.fixture
def transformer_engine() -> None:
    """Mark a test that needs Transformer Engine."""


def missing_markers() -> list[str]:
    """Return the markers whose tests' programs are not installed here, unless all tests are required."""
    if os.environ.get(REQUIRE_ALL):
        return []
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # daemons are commonly beside the PATH of other users
    return [
        marker
        for marker, programs in PROGRAMS.items()
        if any(shutil.which(program, path=path) is None for program in programs)
    ]


@pytest.fixture
def all_mock_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give mock data their usual size, for tests that compare with processes other than their own forks."""
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset

    monkeypatch.setattr(MockGPTLowLevelDataset, "size", mock_documents())


@pytest.fixture(autouse=True)
def package_logging() -> Iterator[None]:
    """Undo what a command sets for the whole process, in a test or in a fixture that lives longer than one."""
    _reset_package_logging()
    yield
    _reset_package_logging()


def _reset_package_logging() -> None:
    package = logging.getLogger("megatron_dwm")
    package.handlers, package.propagate = [], True
    package.setLevel(logging.NOTSET)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m unit``, or another folder's marker alone, read nothing in the other folders."""
    chosen, name = config.option.markexpr, collection_path.name
    is_other = chosen in FOLDERS and name in FOLDERS and name != chosen
    return True if is_other and collection_path.parent == ROOT / "tests" else None


def pytest_collection(session: pytest.Session) -> None:
    """Prepare a process that runs tests; with ``-n`` the first process runs none, and is spared seconds of imports."""
    if xdist.is_xdist_controller(session):
        return
    # Modules are never freed, so collecting during imports takes two seconds and finds nothing.
    gc.disable()
    import torch
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset

    # One thread: a child forked after the parent used OpenMP's threads hangs in its first parallel region.
    torch.set_num_threads(1)

    # megatron-core's 100,000 mock documents are 17 million samples of twelve tokens, and ordering them takes a
    # large part of a small run's time.
    mock_documents()
    MockGPTLowLevelDataset.size = 1000


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    for ignored in (
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
        "ignore:.*(Apex|Transformer Engine|transformer_engine):UserWarning",
    ):
        config.addinivalue_line("filterwarnings", ignored)


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [
        f"deselected: tests marked {marker}, because not all of {', '.join(PROGRAMS[marker])} are installed "
        f"(Debian: {PACKAGES[marker]}); {REQUIRE_ALL}=1 makes them fail instead"
        for marker in missing_markers()
    ] + [f"deselected: tests marked {marker}, because {reason}" for marker, reason in missing_gpus().items()]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by their folder and by what they start, deselect those that cannot run here, and order the rest."""
    missing = {*missing_markers(), *missing_gpus()}
    selected, deselected = [], []
    for item in items:
        folder = Path(item.path).relative_to(ROOT / "tests").parts[0]
        markers = {folder} & set(FOLDERS)
        markers |= {FIXTURES[name] for name in getattr(item, "fixturenames", ()) if name in FIXTURES}
        for marker in sorted(markers):
            item.add_marker(marker)
        (deselected if markers & missing else selected).append(item)
    if deselected:
        config.hook.pytest_deselected(items=deselected)
    items[:] = _spread_unit_tests(selected)


def _spread_unit_tests(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the tests with the files of unit/ evenly among the others.

    Runs of several processes take turns (tests/turns.py), and tests of one process fill the gaps.
    """
    files = [list(tests) for _, tests in itertools.groupby(items, key=lambda item: item.path)]
    unit = [tests for tests in files if tests[0].get_closest_marker("unit")]
    others = [tests for tests in files if not tests[0].get_closest_marker("unit")]
    # First those that wait most of the time, also for a cluster's scheduler; last the short files of mathematics.
    others.sort(key=lambda tests: tests[0].get_closest_marker("e2e") is None)
    for marker in ("waiting", "slurm"):
        others.sort(key=lambda tests: not any(test.get_closest_marker(marker) for test in tests))
    placed = [(number / len(kind), tests) for kind in (others, unit) for number, tests in enumerate(kind)]
    return [item for _, tests in sorted(placed, key=lambda place: place[0]) for item in tests]
