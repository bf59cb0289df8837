"""What tests of commands share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import preloaded


@pytest.fixture(scope="session")
def preloaded_commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a folder to put first into PATH, whose ``python`` and ``megatron-dwm`` need not import anything."""
    commands, server = preloaded.start(tmp_path_factory.mktemp("preloaded"))
    yield commands
    server.kill()
    server.join()
