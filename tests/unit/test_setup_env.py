"""tools/setup_env.sh leaves an environment alone that is not this folder's."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.paths import ROOT


@pytest.mark.parametrize("venv", [".venv", "newest"])
def test_an_environment_behind_a_link_is_not_emptied(venv: str, tmp_path: Path):
    """``python -m venv --clear`` follows the link, empties the folder behind it, and only then refuses."""
    folder, shared = tmp_path / "clone", tmp_path / "shared"
    (folder / "tools").mkdir(parents=True)
    shared.mkdir()
    (shared / "package.py").write_text("")
    for name in ("tools/setup_env.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    (folder / venv).symlink_to(shared)
    environment = {"PATH": os.environ["PATH"], "VENV": venv, "PYTHON": "false"}
    command = ["bash", "tools/setup_env.sh"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and f"error: {venv} is a link to {shared}" in done.stderr
    assert [path.name for path in shared.iterdir()] == ["package.py"]
