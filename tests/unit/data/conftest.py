"""Fixtures of the tests of data."""

from __future__ import annotations

import pytest

from megatron_dwm.config.tokenizer import TokenizerConfig
from tests.unit.data.made_tokenizers import KINDS, config_of


@pytest.fixture(scope="package")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenizerConfig]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: config_of(kind, root / kind) for kind in KINDS}
