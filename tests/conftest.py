"""What every test shares: the CPU, one thread, quiet third-party libraries, and markers."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# Tests run on the CPU whatever the machine has: results are then the same everywhere, and forking stays safe.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from tests.paths import ROOT

# One thread: a child forked after the parent used OpenMP's threads hangs in its first parallel region.
torch.set_num_threads(1)

REQUIRE_ALL = "REQUIRE_ALL_TESTS"
"""Environment variable that makes tests fail, in place of being deselected, where their programs are not installed."""
FOLDERS = ("unit", "distributed", "e2e")
"""Folders whose tests carry the folder's name as a marker."""
PROGRAMS = {"slurm": ("munged", "slurmctld", "slurmd", "sbatch", "srun"), "browser": ("chromium",)}
"""Programs that the tests of a marker start."""
PACKAGES = {"slurm": "slurm-wlm munge", "browser": "chromium"}
"""Debian's packages that have them."""
FIXTURES = {"cluster": "slurm", "browser": "browser"}
"""Markers of the tests that use a fixture."""


def missing_markers() -> list[str]:
    """Return the markers whose tests cannot run here, unless all tests are required."""
    if os.environ.get(REQUIRE_ALL):
        return []
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # daemons are commonly beside the PATH of other users
    return [
        marker
        for marker, programs in PROGRAMS.items()
        if any(shutil.which(program, path=path) is None for program in programs)
    ]


@pytest.fixture(autouse=True)
def package_logging() -> Iterator[None]:
    """Undo what a command of the test sets for the whole process."""
    package = logging.getLogger("megatron_dwm")
    handlers, level, propagate = package.handlers, package.level, package.propagate
    yield
    package.handlers, package.propagate = handlers, propagate
    package.setLevel(level)


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
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by their folder and by what they start, and deselect those that cannot run here."""
    missing = set(missing_markers())
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
        items[:] = selected
