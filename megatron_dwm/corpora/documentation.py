"""A corpus of installed documentation, larger and more varied than the built-in one: a source for each package.

Debian's packages list their files and their version, and so do Python's distributions; npm's are folders below
node_modules. HTML pages, text files and the docstrings of modules are read, and text in the special formats of some
packages (``packaged_text.py``). If a package has HTML pages, its text files are left out: they often hold the same.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import random
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

from megatron_dwm.corpora.corpus import Corpus, CorpusConfig, Document, SeenTexts, first, split, with_progress
from megatron_dwm.corpora.packaged_text import special_texts
from megatron_dwm.corpora.standard_library import docstrings, parse_module
from megatron_dwm.errors import UserError

_PAGES = {".html", ".htm"}
_TEXTS = {".txt", ".rst", ".md"}
_NOT_READ = re.compile(r"(^|/)(tests?|[^/]*\.dist-info)/")


class Package(NamedTuple):
    """An installed package: its name in ``--documentation``, its version, its files."""

    spec: str
    version: str
    files: dict[str, Path]
    """The path of each file, by its name relative to wherever the package is installed."""

    @property
    def name(self) -> str:
        """The name of its source."""
        return self.spec.partition(":")[2]


def documentation_corpus(config: CorpusConfig) -> Corpus:
    """Build a corpus from the packages that ``config.documentation`` names, each split into parts by document.

    Raises:
        UserError: a package is not installed, is named twice, or has too little text.
    """
    packages = [find_package(spec) for spec in config.documentation]
    twice = [name for name, times in Counter(package.name for package in packages).items() if times > 1]
    if twice:
        raise UserError(f"--documentation has two sources named {twice[0]}; leave one out")
    seen, rng = SeenTexts(), random.Random(config.seed)
    corpus: Corpus = {}
    for package in packages:
        documents = [
            Document(seen.new_paragraphs(text), f"{package.spec}={package.version}/{name}")
            for name, text in with_progress(texts(package), package.name)
        ]
        parts = split(documents, config.heldout_bytes, rng)
        parts["train"] = first(parts["train"], config.documentation_bytes)
        for part, held in parts.items():
            if not held:
                raise UserError(
                    f"--documentation {package.spec}: no text is left for {part}; lower --heldout-bytes "
                    f"{config.heldout_bytes}, or name a package with more documentation"
                )
        corpus[package.name] = parts
    return corpus


def find_package(spec: str) -> Package:
    """Return the package that ``debian:NAME``, ``pypi:NAME`` or ``npm:NAME`` names.

    Raises:
        UserError: it is not installed, or its files are not on this machine.
    """
    kind, _, name = spec.partition(":")
    read = {"debian": _debian, "pypi": _pypi, "npm": _npm}.get(kind)
    if read is None or not name:
        raise UserError(f"--documentation {spec}: no such kind of package; give debian:NAME, pypi:NAME or npm:NAME")
    return read(spec, name)


def texts(package: Package) -> Iterator[tuple[str, str]]:
    """Yield name and text of the files that hold documentation, in the order of their names."""
    if (special := special_texts(package.spec, package.files)) is not None:
        yield from special
        return
    kinds = {_suffix(path) for path in package.files.values()}
    wanted = {".py", *(_PAGES if _PAGES & kinds else _TEXTS)}
    for name, path in sorted(package.files.items()):
        if _suffix(path) in wanted and path.is_file() and not _NOT_READ.search(name):
            yield name, _text(path)


def _debian(spec: str, name: str) -> Package:
    if shutil.which("dpkg-query") is None:
        raise UserError(f"--documentation {spec}: dpkg-query is not on this machine; name packages of PyPI, pypi:NAME")
    version = _dpkg_query("--show", "--showformat", "${db:Status-Status} ${Version}", name)
    if not version.startswith("installed "):
        raise UserError(f"--documentation {spec}: not installed; apt-get install {name}, or leave it out")
    files = {line.lstrip("/"): Path(line) for line in _dpkg_query("--listfiles", name).splitlines()}
    has_text = special_texts(spec, {}) is not None
    if not has_text and not any(path.is_file() and _suffix(path) in _PAGES | _TEXTS for path in files.values()):
        raise UserError(
            f"--documentation {spec}: no HTML page or text of it is on this machine; if dpkg leaves documentation out "
            f"(path-exclude in /etc/dpkg/dpkg.cfg.d), install it again without that, else name another package"
        )
    return Package(spec, version.removeprefix("installed "), files)


def _dpkg_query(*arguments: str) -> str:
    return subprocess.run(["dpkg-query", *arguments], capture_output=True, text=True).stdout


def _pypi(spec: str, name: str) -> Package:
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"--documentation {spec}: not installed; pip install {name}, or leave it out") from None
    files = {str(file): Path(str(distribution.locate_file(file))) for file in distribution.files or ()}
    return Package(spec, distribution.version, files)


def _npm(spec: str, name: str) -> Package:
    folder = Path("node_modules") / name
    try:
        version = json.loads((folder / "package.json").read_text())["version"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"--documentation {spec}: not below {folder}; npm install {name}, or leave it out") from None
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return Package(spec, version, files)


def _suffix(path: PurePath) -> str:
    """Return the suffix of a file, without that of its compression."""
    return PurePath(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _text(path: Path) -> str:
    """Return the documentation in a file."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    if _suffix(path) == ".py":
        tree = parse_module(content)
        return "" if tree is None else docstrings(tree)
    if _suffix(path) in _TEXTS:
        return content.decode("utf-8", "ignore")
    return _page(content)


def _page(content: bytes) -> str:
    """Return the text of an HTML page, without its navigation."""
    # Imported here: the built-in corpus does not need it.
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding
    from resiliparse.parse.html import HTMLTree

    try:  # valid UTF-8 is UTF-8; a page in another encoding names it
        page = content.decode()
    except UnicodeDecodeError:
        page = bytes_to_str(content, detect_encoding(content, from_html_meta=True) or "utf-8")
    return extract_plain_text(HTMLTree.parse(page), main_content=True, alt_texts=False, links=False, form_fields=False)
