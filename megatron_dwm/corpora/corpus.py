"""A corpus: sources of text, each in parts for training, target and test, with no text in two of them."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from tqdm import tqdm

from megatron_dwm.atomic_write import atomic_files
from megatron_dwm.config.flags import flag, require_at_least, require_given, require_paths
from megatron_dwm.errors import UserError

Item = TypeVar("Item")

PARTS = ("train", "target", "test")

MIN_BYTES = 200  # of a document: shorter texts are fragments
_DIVERSITY = 8  # target and test hold at least this many documents, so that neither is one long text


@dataclass(frozen=True)
class CorpusConfig:
    """Corpus."""

    output: str = flag("", "Folder to write <source>.<part>.jsonl to.")
    seed: int = flag(1234, "Seed of the split into parts and of the shuffling of words.")
    shuffle: Literal["words", "characters"] = flag(
        "words",
        "How the shuffled text is made: by shuffling the words of a paragraph, or the characters within windows of 8.",
    )
    prose_bytes: int = flag(1_200_000, "Maximum bytes of text in the training part of prose, and of comments.")
    code_bytes: int = flag(2_500_000, "Maximum bytes of text in the training part of code, and of shuffled.")
    documentation: list[str] = flag(
        [],
        "Build the corpus from the text of installed packages instead, one source each: debian:NAME for what Debian's "
        "package NAME installs, pypi:NAME for a Python distribution, npm:NAME for a folder of ./node_modules.",
    )
    documentation_bytes: int = flag(4_000_000, "Maximum bytes of text in the training part of each package.")
    heldout_bytes: int = flag(200_000, "Bytes of text in the target part, and in the test part, of each source.")

    def __post_init__(self) -> None:
        require_given(self, "output", "give a folder")
        require_paths(self, "output")
        if Path(self.output).exists() and not Path(self.output).is_dir():
            raise UserError(f"--output {self.output}: not a folder; give another path")
        require_at_least(self, 1, "prose_bytes code_bytes documentation_bytes heldout_bytes")


class Document(NamedTuple):
    """A text and its origin: a source, and a file or an entry there."""

    text: str
    id: str

    @property
    def size(self) -> int:
        """Bytes of text."""
        return len(self.text.encode())


Corpus = dict[str, dict[str, list[Document]]]  # source -> part -> documents


class SeenTexts:
    """The texts that have been used, compared by their words alone: case, punctuation and layout do not count."""

    def __init__(self) -> None:
        self._keys: set[str] = set()

    @staticmethod
    def _key(text: str) -> str:
        return " ".join(re.findall(r"\w+", text.lower()))

    def __contains__(self, text: str) -> bool:
        return self._key(text) in self._keys

    def add(self, text: str) -> bool:
        """Add ``text``; return whether it has words and is new."""
        key = self._key(text)
        if not key or key in self._keys:
            return False
        self._keys.add(key)
        return True

    def new_paragraphs(self, text: str) -> str:
        """Return ``text`` without the paragraphs that were seen before."""
        return "\n\n".join(paragraph for paragraph in paragraphs(text) if self.add(paragraph))


def with_progress(items: Iterable[Item], description: str) -> Iterable[Item]:
    """Return the items behind a progress bar, which a terminal shows while they are read."""
    bar: Iterable[Item] = tqdm(items, desc=description, unit=" files", leave=False, disable=None)
    return bar


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs of a text, which empty lines divide."""
    return [paragraph.rstrip() for paragraph in re.split(r"\n\s*\n", text.strip("\n")) if paragraph.strip()]


def split(documents: Iterable[Document], heldout_bytes: int, rng: random.Random) -> dict[str, list[Document]]:
    """Divide the documents at random: target and test get ``heldout_bytes`` each, train the rest."""
    left = [document for document in documents if document.size >= MIN_BYTES]
    rng.shuffle(left)
    parts: dict[str, list[Document]] = {}
    for part in ("target", "test"):
        small = [document for document in left if document.size * _DIVERSITY <= heldout_bytes]
        parts[part] = first(small, heldout_bytes)
        taken = {document.id for document in parts[part]}
        left = [document for document in left if document.id not in taken]
    return {"train": left, **parts}


def first(documents: list[Document], size: int) -> list[Document]:
    """Return as many of the first documents as fit into ``size`` bytes."""
    ends = itertools.accumulate(document.size for document in documents)
    return [document for document, end in zip(documents, ends, strict=True) if end <= size]


def write_corpus(corpus: Corpus, folder: Path) -> None:
    """Write ``folder/<source>.<part>.jsonl``: objects with ``text``, ``source`` and ``id``.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        with atomic_files(folder) as scratch:
            for source, parts in corpus.items():
                for part, documents in parts.items():
                    with (scratch / f"{source}.{part}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
                        for document in documents:
                            line = {"text": document.text, "source": source, "id": document.id}
                            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise UserError(
            f"--output {folder}: cannot be written ({error.strerror or error}); give another path"
        ) from error


def table(corpus: Corpus) -> str:
    """Return a table of sources and parts, with the number of documents and the bytes of text."""
    lines = [f"{'source':<10}" + "".join(f"{part + ' docs':>14}{'bytes':>11}" for part in PARTS)]
    for source, parts in corpus.items():
        cells = ((len(parts[part]), sum(document.size for document in parts[part])) for part in PARTS)
        lines.append(f"{source:<10}" + "".join(f"{documents:>14,}{size:>11,}" for documents, size in cells))
    return "\n".join(lines)
