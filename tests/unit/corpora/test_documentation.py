"""Corpora of installed documentation, from a package that dpkg installed and from Python distributions."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dwm.corpora.corpus import PARTS
from tests.paths import ROOT
from tests.unit.corpora.test_standard_library import Lines, long_paragraphs

WORDS = shlex.split("a page tells what the option does and when it is of use to those who run the server at night")
PAGE = """<!DOCTYPE html><html><head><meta charset="{code}"><style>p {{ color: red }}</style></head><body>
<nav><ul><li><a href="index.html">Contents</a></li><li><a href="up.html">Up to the chapter</a></li></ul></nav>
<main><h1>Page {n}</h1><p>{text}</p><p>This very paragraph stands on each of the pages, as licences do.</p>
<p>Gr&uuml;&szlig;e &amp; caf\xe9 number {n}.</p></main></body></html>"""

Admin = dict[str, str]  # the environment in which dpkg knows the package


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Admin:
    """A package manual-doc of version 1.2-3, installed into a dpkg database that the test makes."""
    folder = tmp_path_factory.mktemp("dpkg")
    files = folder / "build" / str(folder).lstrip("/") / "doc"
    (files / "tests").mkdir(parents=True)
    rng = random.Random(1)
    for number in range(40):
        text = " ".join(f"{word}{number}" for word in rng.choices(WORDS, k=60))
        code = "iso-8859-1" if number % 2 else "utf-8"
        page = PAGE.format(n=number, text=text, code=code).encode(code)
        if number % 4 < 2:
            (files / f"page{number}.html").write_bytes(page)
        else:
            (files / f"page{number}.html.gz").write_bytes(gzip.compress(page))
        (files / f"page{number}.txt").write_text(f"the same page as text, {text}")
    (files / "tests" / "page.html").write_text(PAGE.format(n=99, text="what only a test says " * 20, code="utf-8"))
    control = folder / "build" / "DEBIAN" / "control"
    control.parent.mkdir()
    control.write_text(
        "Package: manual-doc\nVersion: 1.2-3\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\n"
        "Description: pages\n"
    )
    database = folder / "database"
    (database / "updates").mkdir(parents=True)
    (database / "info").mkdir()
    for name in ("status", "available"):
        (database / name).touch()
    archive = folder / "manual-doc.deb"
    run("dpkg-deb", "--root-owner-group", "--build", folder / "build", archive)
    options = (f"--admindir={database}", "--force-not-root", f"--log={folder}/log", "--no-debsig")
    run("dpkg", *options, "--install", archive)
    return {**os.environ, "DPKG_ADMINDIR": str(database)}


def run(*command: object) -> None:
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def build(environment: Admin, *arguments: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "tools/build_corpus.py", *map(str, arguments)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def lines(admin: Admin, tmp_path_factory: pytest.TempPathFactory) -> Lines:
    folder = tmp_path_factory.mktemp("corpus")
    made = build(
        admin, "--output", folder, "--documentation", "debian:manual-doc", "pypi:numpy", "--heldout-bytes", 6000
    )
    assert made.returncode == 0, made.stderr
    names = ("manual-doc", "numpy")
    assert {path.name for path in folder.iterdir()} == {f"{name}.{part}.jsonl" for name in names for part in PARTS}
    return {
        (name, part): [json.loads(line) for line in (folder / f"{name}.{part}.jsonl").open()]
        for name in names
        for part in PARTS
    }


def test_each_package_is_a_source_with_its_version(lines: Lines) -> None:
    for (name, _), documents in lines.items():
        assert documents and all(document["source"] == name for document in documents)
    pages = {item["id"] for part in PARTS for item in lines["manual-doc", part]}
    assert len(pages) == 40 and all(id.startswith("debian:manual-doc=1.2-3/") for id in pages)
    modules = {item["id"] for part in PARTS for item in lines["numpy", part]}
    assert any(re.fullmatch(r"pypi:numpy=\d+\.\d+\.\d+/numpy/ma/core.py", id) for id in modules)


def test_pages_are_text_without_what_surrounds_it(lines: Lines) -> None:
    texts = [item["text"] for part in PARTS for item in lines["manual-doc", part]]
    assert all("Grüße & café number" in text for text in texts), "characters of a page are not what they were"
    assert not any(word in text for text in texts for word in ("<", "color: red", "Up to the chapter"))
    assert not any("what only a test says" in text or "the same page as text" in text for text in texts)


def test_no_paragraph_is_in_two_places(lines: Lines) -> None:
    paragraphs = [
        paragraph for documents in lines.values() for item in documents for paragraph in long_paragraphs(item["text"])
    ]
    assert len(paragraphs) == len(set(paragraphs)) > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rpm:manual-doc"], "--documentation rpm:manual-doc: no such kind of package; give debian:NAME, pypi:NAME or"),
        (["debian:none-doc"], "--documentation debian:none-doc: not installed; apt-get install none-doc"),
        (["pypi:none-doc"], "--documentation pypi:none-doc: not installed; pip install none-doc"),
        (["npm:none-doc"], "--documentation npm:none-doc: not below node_modules/none-doc; npm install none-doc"),
        (["debian:manual-doc", "pypi:manual-doc"], "--documentation pypi:manual-doc: not installed"),
        (["pypi:jinja2", "pypi:jinja2"], "--documentation has two sources named jinja2; leave one out"),
        (["debian:manual-doc"], "--documentation debian:manual-doc: no text is left for train; lower --heldout-bytes"),
        (["pypi:jinja2", "--documentation-bytes", "0"], "--documentation-bytes 0: must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, admin: Admin, tmp_path: Path) -> None:
    finished = build(admin, "--output", tmp_path / "out", "--documentation", *arguments)
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"error: {message}") and finished.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_package_whose_documentation_was_left_out_is_refused(admin: Admin, tmp_path: Path) -> None:
    files = subprocess.run(["dpkg-query", "--listfiles", "manual-doc"], capture_output=True, text=True, env=admin)
    moved = {Path(line): Path(line + ".away") for line in files.stdout.splitlines() if Path(line).is_file()}
    for path, away in moved.items():
        path.rename(away)
    try:
        finished = build(admin, "--output", tmp_path / "out", "--documentation", "debian:manual-doc")
    finally:
        for path, away in moved.items():
            away.rename(path)
    assert finished.returncode == 2 and "no HTML page or text of it is on this machine" in finished.stderr
