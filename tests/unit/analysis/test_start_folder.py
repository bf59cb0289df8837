"""The folder that a run was started from, found wherever this is started, and after a project has been moved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dwm.analysis.start_folder import find_start_folder, working_in

NAMED = ["data/train.idx", "tokenizer.model"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    for name in NAMED:
        (folder / name).touch()
    return folder


def make_run(folder: Path, started_in: Path | None = None) -> Path:
    folder.mkdir(parents=True)
    if started_in is not None:
        (folder / "run_status.json").write_text(json.dumps({"status": "finished", "folder": str(started_in)}))
    return folder


def test_the_present_folder_comes_first(project: Path, tmp_path: Path):
    save = make_run(tmp_path / "elsewhere" / "run", tmp_path)
    with working_in(project):
        assert find_start_folder(save, "run", NAMED) == project
    assert Path.cwd() != project


def test_a_run_beside_its_project_is_known_by_its_status(project: Path, tmp_path: Path):
    save = make_run(tmp_path / "scratch" / "run", project)
    assert find_start_folder(save, str(save), NAMED) == project
    damaged = make_run(tmp_path / "scratch" / "other")
    (damaged / "run_status.json").write_text("[1")
    assert find_start_folder(damaged, str(damaged), NAMED) == Path.cwd()  # nothing is found from anywhere


@pytest.mark.parametrize("saved_as", ["runs/mine", "./runs//mine", "/moved/from/runs/mine"])
def test_a_run_in_its_project_is_known_by_its_place(saved_as: str, project: Path, tmp_path: Path):
    save = make_run(project / "runs" / "mine", tmp_path / "where_it_was")
    assert find_start_folder(save, saved_as, NAMED) == project
