"""The status of a run in its folder."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_dwm.training.run_status import read_run_status, write_run_status
from tests.distributed.harness import run_distributed


def test_a_run_whose_working_folder_was_deleted_says_how_it_ended(tmp_path: Path):
    def end() -> None:
        (tmp_path / "started").mkdir()
        os.chdir(tmp_path / "started")
        (tmp_path / "started").rmdir()
        write_run_status(str(tmp_path), "finished", 3)

    run_distributed(end, 1)
    assert read_run_status(tmp_path) == {"status": "finished", "iteration": 3, "reason": "", "folder": ""}
