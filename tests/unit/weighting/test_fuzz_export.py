"""Whatever became of a file of an exported weighter, it is refused in one line, or is still that weighter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies

from megatron_dwm.errors import UserError
from megatron_dwm.weighting.export_manifest import MANIFEST
from tests.fuzzing import assert_short_line, damaged, fuzz_settings
from tests.unit.weighting.test_export_manifest import load, make_export


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def expected(whole: Path) -> dict[str, torch.Tensor]:
    return load(whole).state_dict()


@fuzz_settings(25)
@given(data=strategies.data())
def test_a_damaged_file_is_refused_or_changes_nothing(
    data: strategies.DataObject, whole: Path, expected: dict[str, torch.Tensor]
) -> None:
    """Without its manifest it is anybody's model: then it may be another one, but a whole one."""
    manifest = (whole / MANIFEST).read_bytes()
    path = whole / data.draw(strategies.sampled_from(sorted(path.name for path in whole.iterdir())))
    has_manifest = path.name == MANIFEST or data.draw(strategies.booleans())
    content, before = path.read_bytes(), sorted(whole.iterdir())
    try:
        path.write_bytes(data.draw(damaged(content)))
        if not has_manifest:
            (whole / MANIFEST).unlink()
        try:
            found = load(whole).state_dict()
        except UserError as error:
            assert f"--dwm-load {whole}" in assert_short_line(error)
        else:
            assert all(torch.isfinite(value).all() for value in found.values())
            if has_manifest:
                assert all(torch.equal(found[key], value) for key, value in expected.items())
    finally:
        path.write_bytes(content)
        (whole / MANIFEST).write_bytes(manifest)
    assert sorted(whole.iterdir()) == before
