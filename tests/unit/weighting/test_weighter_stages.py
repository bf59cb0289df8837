"""Which of a run's exports is used when, in a run of another length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dwm.errors import UserError
from megatron_dwm.weighting.export_manifest import MANIFEST
from megatron_dwm.weighting.weighter_stages import weighter_stages


def export(root: Path, iteration: int, stage: int, **facts: int) -> None:
    folder = root / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(json.dumps({"iteration": iteration, "stage": stage, **facts}))


def stages(root: Path, train_iters: int) -> list[tuple[str, int, int]]:
    found = weighter_stages("--dwm-load", str(root), train_iters)
    return [(Path(stage.folder).name, stage.last_iteration, stage.number) for stage in found]


def test_the_last_export_of_each_stage_serves_the_same_fraction_of_training(tmp_path: Path):
    for iteration, stage in ((50, 0), (150, 1), (200, 1), (400, 2), (600, 3)):
        export(tmp_path, iteration, stage, train_iters=600)
    expected = [("iter_0000200", 1000, 1), ("iter_0000400", 2000, 2), ("iter_0000600", 3000, 3)]
    assert stages(tmp_path, 3000) == expected
    # A run of two iterations has no room for three stages.
    assert stages(tmp_path, 2) == [("iter_0000200", 1, 1), ("iter_0000600", 2, 3)]


def test_the_last_weighter_of_a_run_that_was_interrupted_serves_for_the_rest(tmp_path: Path):
    for iteration, stage in ((200, 1), (300, 2)):
        export(tmp_path, iteration, stage, train_iters=600)
    assert stages(tmp_path, 60) == [("iter_0000200", 20, 1), ("iter_0000300", 60, 2)]


def test_one_export_serves_for_the_whole_run(tmp_path: Path):
    export(tmp_path, 200, 1)
    (tmp_path / "iter_0000200/config.json").write_text("{}")
    assert stages(tmp_path / "iter_0000200", 7) == [("iter_0000200", 7, 1)]


def test_a_run_is_at_least_as_long_as_its_last_export(tmp_path: Path):
    export(tmp_path, 200, 1, train_iters=-5)
    assert stages(tmp_path, 7) == [("iter_0000200", 7, 1)]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"stage": 1}', '{"stage": "x", "iteration": 3}', '{"stage": 1e999, "iteration": 3}']
)
def test_a_damaged_manifest_is_named(text: str, tmp_path: Path):
    export(tmp_path, 200, 1)
    (tmp_path / "iter_0000200" / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=f"--dwm-load {tmp_path}: .*iter_0000200/{MANIFEST} cannot be read"):
        stages(tmp_path, 10)
