"""What every test shares: the CPU, one thread, and quiet third-party libraries."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

# Tests run on the CPU whatever the machine has: results are then the same everywhere, and forking stays safe.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

# One thread: a child forked after the parent used OpenMP's threads hangs in its first parallel region.
torch.set_num_threads(1)


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
