"""tools/setup_env.sh leaves an environment alone that is not this folder's."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.paths import ROOT


def test_an_environment_behind_a_link_is_not_emptied(tmp_path: Path):
    """``python -m venv --clear`` follows the link, empties the folder behind it, and only then refuses."""
    folder, shared = tmp_path / "clone", tmp_path / "shared"
    (folder / "tools").mkdir(parents=True)
    shared.mkdir()
    (shared / "package.py").write_text("")
    for name in ("tools/setup_env.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(shared)
    done = subprocess.run(["bash", "tools/setup_env.sh"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and f".venv is a link to {shared}" in done.stderr
    assert [path.name for path in shared.iterdir()] == ["package.py"]
