"""The README's map: every file is on it, and everything on it is there."""

from __future__ import annotations

import re
import subprocess

from tests.paths import ROOT

UNMAPPED = {".gitignore", "README.md"}


def mapped_paths() -> list[str]:
    """The paths in the map's first column; ``a/b.py`` followed by ``c.py`` means ``a/c.py``."""
    section = (ROOT / "README.md").read_text().split("## Map")[1]
    paths = []
    for row in section.splitlines():
        folder = ""
        for path in re.findall(r"`([^`]+)`", row.split("|")[1]) if row.startswith("| `") else ():
            if "/" not in path and folder:
                path = f"{folder}/{path}"
            folder = path.rpartition("/")[0]
            paths.append(path)
    return paths


def test_everything_on_the_map_is_there():
    paths = mapped_paths()
    assert len(paths) > 50
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_file_is_on_the_map():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    files = {path for path in listed if (ROOT / path).exists() and not path.endswith("__init__.py")} - UNMAPPED
    paths = mapped_paths()
    folders = tuple(path for path in paths if path.endswith("/"))
    assert [file for file in sorted(files) if file not in paths and not file.startswith(folders)] == []


def test_relative_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
