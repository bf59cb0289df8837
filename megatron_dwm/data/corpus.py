"""A small corpus of several sources, made from the interpreter's own standard library.

No download and no import of what is read: the library's files are parsed. Good text is ``prose``, the
documentation; ``code`` and ``comments`` are other real text; ``shuffled`` is bad text: documentation that no
other source holds, its words or its characters in random order. No text is in two documents, so no part or source leaks
into another.
"""

from __future__ import annotations

import ast
import inspect
import io
import itertools
import json
import os
import random
import re
import sysconfig
import tempfile
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_dwm.arguments import flag
from megatron_dwm.errors import UserError

PARTS = ("train", "target", "test")

_NOT_READ = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
}  # other packages, not everywhere, tables
_TOPICS = "pydoc_data/topics.py"
_LEAST_WORDS = 8  # of what counts as text that must not be twice, and of a comment
_LEAST_BYTES = 200  # of a document
_TABLE = 1000  # characters of a module's statement from which on it is a table, not code
_SHUFFLED_SHARE = 0.3  # of the prose outside target and test
_MOST_SHUFFLES = 10  # of one document
_WINDOW = 8  # characters that are put in random order together
_DIVERSITY = 8  # target and test hold at least so many documents

_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class CorpusConfig:
    """Corpus."""

    output: str | None = flag(None, "Folder that receives <source>.<part>.jsonl.")
    seed: int = flag(1234, "Seed of the split into parts and of the shuffling of words.")
    shuffle: Literal["words", "characters"] = flag(
        "words", "What the bad text has in random order: a paragraph's words, or the characters of each eight."
    )
    prose_bytes: int = flag(1_200_000, "Most bytes of text in the train part of prose, and of comments.")
    code_bytes: int = flag(2_500_000, "Most bytes of text in the train part of code, and of shuffled.")
    heldout_bytes: int = flag(200_000, "Bytes of text in the target part, and in the test part, of each source.")

    def __post_init__(self) -> None:
        if not self.output:
            raise UserError("--output is missing; give a folder")
        if Path(self.output).exists() and not Path(self.output).is_dir():
            raise UserError(f"--output {self.output}: no folder; give another path")
        for name, value in (
            ("--prose-bytes", self.prose_bytes),
            ("--code-bytes", self.code_bytes),
            ("--heldout-bytes", self.heldout_bytes),
        ):
            if value < 1:
                raise UserError(f"{name} {value} is less than 1; give a positive number")


class Document(NamedTuple):
    """A text and where it is from: a file of the library, or a topic of its documentation."""

    text: str
    id: str

    @property
    def size(self) -> int:
        """Bytes of text."""
        return len(self.text.encode())


Corpus = dict[str, dict[str, list[Document]]]  # source -> part -> documents


def build_corpus(config: CorpusConfig, library: Path | None = None) -> Corpus:
    """Make the corpus of ``library``, by default the running interpreter's standard library.

    Raises:
        UserError: the library's sources are not there, or are too few for the sizes asked for.
    """
    root = library or Path(sysconfig.get_path("stdlib"))
    seen = _Seen()
    modules = list(_modules(root))
    prose = []
    for module in modules:
        texts = _topics(module.tree) if module.name == _TOPICS else [(module.name, _docstrings(module.tree))]
        prose += [Document(seen.new_paragraphs(text), f"prose/{name}") for name, text in texts]
    comments = [
        Document(seen.new_paragraphs(_comments(module.source)), f"comments/{module.name}") for module in modules
    ]
    code = [
        Document(_Code(seen).text(module.tree), f"code/{module.name}") for module in modules if module.name != _TOPICS
    ]
    corpus = _deal(prose, comments, code, config, seen)
    for source, parts in corpus.items():
        for part, documents in parts.items():
            if not documents:
                raise UserError(
                    f"{root}: no text is left for {source}.{part}; lower --heldout-bytes {config.heldout_bytes}, "
                    "raise the other sizes, or use a Python that has the sources of its standard library"
                )
    return corpus


def _deal(
    prose: list[Document], comments: list[Document], code: list[Document], config: CorpusConfig, seen: _Seen
) -> Corpus:
    """Split the sources into parts of the sizes asked for, and make bad text of a share of the prose."""
    rng = random.Random(config.seed)
    corpus = {
        "prose": _split(prose, config.heldout_bytes, rng),
        "code": _split(code, config.heldout_bytes, rng),
        "comments": _split(comments, config.heldout_bytes, rng),
    }
    corpus["prose"]["train"], base = _share(corpus["prose"]["train"], _SHUFFLED_SHARE)
    corpus["shuffled"] = {
        part: _shuffled(documents, config, config.code_bytes if part == "train" else config.heldout_bytes, seen, rng)
        for part, documents in _split(base, sum(document.size for document in base) // 8, rng).items()
    }
    for name, most in (("prose", config.prose_bytes), ("comments", config.prose_bytes), ("code", config.code_bytes)):
        corpus[name]["train"] = _first(corpus[name]["train"], most)
    return corpus


def write_corpus(corpus: Corpus, folder: Path) -> None:
    """Write ``folder/<source>.<part>.jsonl``: objects with ``text``, ``source`` and ``id``.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".corpus-") as scratch:
            for source, parts in corpus.items():
                for part, documents in parts.items():
                    with Path(scratch, f"{source}.{part}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
                        for document in documents:
                            line = {"text": document.text, "source": source, "id": document.id}
                            file.write(json.dumps(line) + "\n")
                        file.flush()
                        os.fsync(file.fileno())
            for path in sorted(Path(scratch).iterdir()):
                os.replace(path, folder / path.name)
    except OSError as error:
        raise UserError(
            f"--output {folder}: cannot be written ({error.strerror or error}); give another path"
        ) from error


def table(corpus: Corpus) -> str:
    """Sources by parts, with the number of documents and the bytes of text."""
    lines = [f"{'source':<10}" + "".join(f"{part + ' docs':>14}{'bytes':>11}" for part in PARTS)]
    for source, parts in corpus.items():
        cells = ((len(parts[part]), sum(document.size for document in parts[part])) for part in PARTS)
        lines.append(f"{source:<10}" + "".join(f"{documents:>14,}{size:>11,}" for documents, size in cells))
    return "\n".join(lines)


class _Module(NamedTuple):
    """A file of the library: its path below the library's folder, its text, its syntax tree."""

    name: str
    source: bytes
    tree: ast.Module


class _Seen:
    """The texts that have been used, told apart by their words alone: case, punctuation and layout do not count."""

    def __init__(self) -> None:
        self._keys: set[str] = set()

    @staticmethod
    def _key(text: str) -> str:
        return " ".join(re.findall(r"\w+", text.lower()))

    def __contains__(self, text: str) -> bool:
        return self._key(text) in self._keys

    def add(self, text: str) -> bool:
        """Whether ``text`` has words and is new."""
        key = self._key(text)
        if not key or key in self._keys:
            return False
        self._keys.add(key)
        return True

    def new_paragraphs(self, text: str) -> str:
        """``text`` without the paragraphs that were seen before."""
        return "\n\n".join(paragraph for paragraph in _paragraphs(text) if self.add(paragraph))


def _paragraphs(text: str) -> list[str]:
    return [paragraph.rstrip() for paragraph in re.split(r"\n\s*\n", text.strip("\n")) if paragraph.strip()]


def _modules(root: Path) -> Iterator[_Module]:
    """The modules below ``root``, in the order of their paths."""
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name, path in sorted(paths.items()):
        # What _sysconfigdata holds is how this interpreter was built.
        if _NOT_READ & set(name.split("/")) or name.startswith("_sysconfigdata"):
            continue
        source = path.read_bytes()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules
                tree = ast.parse(source)
        except (SyntaxError, ValueError):  # samples of broken or old source
            continue
        yield _Module(name, source, tree)


def _topics(tree: ast.Module) -> list[tuple[str, str]]:
    """Name and text of the entries of pydoc's dictionary of topics."""
    dictionaries = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
    ]
    return [(f"topic:{name}", _prose(text)) for node in dictionaries for name, text in ast.literal_eval(node).items()]


def _docstrings(tree: ast.Module) -> str:
    texts = (
        ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, *_FUNCTION))
    )
    return _prose("\n\n".join(text for text in texts if text))


def _prose(text: str) -> str:
    """``text`` without examples of a session with the interpreter, and without what UTF-8 cannot write."""
    text = text.encode("utf-8", "ignore").decode()
    return "\n\n".join(paragraph for paragraph in _paragraphs(text) if ">>>" not in paragraph)


def _comments(source: bytes) -> str:
    """The comments of some length, without their marks; those on consecutive lines are one."""
    blocks: list[list[str]] = []
    below = (-1, -1)  # where the next line of the last block would begin
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if token.start != below:
            blocks.append([])
        blocks[-1].append(token.string)
        below = (token.start[0] + 1, token.start[1])
    return "\n\n".join(filter(None, map(_comment, blocks)))


def _comment(lines: list[str]) -> str:
    text = inspect.cleandoc("\n".join(line.lstrip("#") for line in ["", *lines]))
    return text if len(text.split()) >= _LEAST_WORDS else ""


class _Code(ast.NodeTransformer):
    """Takes out docstrings and whatever holds text seen before, and adds what is left to the text seen."""

    def __init__(self, seen: _Seen) -> None:
        self._seen = seen

    def text(self, tree: ast.Module) -> str:
        """The source of the module, whose tree is changed."""
        self.generic_visit(tree)
        tree.body = [statement for statement in tree.body if self._is_kept(statement)]
        return ast.unparse(tree)

    def visit(self, node: ast.AST) -> ast.AST:
        # No statement is inside an expression.
        return node if isinstance(node, ast.expr) else super().visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        # A string that stands by itself documents what is above it.
        is_string = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return ast.Pass() if is_string else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.stmt:
        return self._definition(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.stmt:
        return self._definition(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.stmt:
        return self._definition(node)

    def _definition(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> ast.stmt:
        self.generic_visit(node)  # what is inside first, so that a class is judged by what is left of it
        node.body = [statement for statement in node.body if not isinstance(statement, ast.Pass)] or [ast.Pass()]
        return node if self._is_new(node.body) else ast.Pass()

    def _is_kept(self, statement: ast.stmt) -> bool:
        """Whether a statement of the module stays."""
        if isinstance(statement, (ast.ClassDef, *_FUNCTION)):
            return True  # judged already
        if isinstance(statement, ast.Pass):
            return False
        is_code = not isinstance(statement, (ast.Assign, ast.AnnAssign)) or len(ast.unparse(statement)) < _TABLE
        return is_code and self._is_new([statement])

    def _is_new(self, body: list[ast.stmt]) -> bool:
        text = "\n".join(ast.unparse(statement) for statement in body)
        if len(re.findall(r"\w+", text)) < _LEAST_WORDS:
            return True
        strings = [
            node.value
            for statement in body
            for node in ast.walk(statement)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        copied = any(
            len(paragraph.split()) >= _LEAST_WORDS and paragraph in self._seen
            for string in strings
            for paragraph in _paragraphs(string)
        )
        return not copied and self._seen.add(text)


def _split(documents: Iterable[Document], heldout_bytes: int, rng: random.Random) -> dict[str, list[Document]]:
    """Deal the documents out at random: target and test get ``heldout_bytes`` each, train the rest."""
    left = [document for document in documents if document.size >= _LEAST_BYTES]
    rng.shuffle(left)
    parts: dict[str, list[Document]] = {}
    for part in ("target", "test"):
        small = [document for document in left if document.size * _DIVERSITY <= heldout_bytes]
        parts[part] = _first(small, heldout_bytes)
        taken = {document.id for document in parts[part]}
        left = [document for document in left if document.id not in taken]
    return {"train": left, **parts}


def _first(documents: list[Document], size: int) -> list[Document]:
    """As many of the first documents as fit into ``size`` bytes."""
    ends = itertools.accumulate(document.size for document in documents)
    return [document for document, end in zip(documents, ends, strict=True) if end <= size]


def _share(documents: list[Document], share: float) -> tuple[list[Document], list[Document]]:
    """The documents in two, the second of at most ``share`` of the bytes."""
    second = _first(documents, int(share * sum(document.size for document in documents)))
    return documents[len(second) :], second


def _shuffled(
    documents: list[Document], config: CorpusConfig, size: int, seen: _Seen, rng: random.Random
) -> list[Document]:
    """At most ``size`` bytes of the documents with each paragraph in random order, over and over."""
    shuffle = _shuffle_words if config.shuffle == "words" else _shuffle_characters
    results: list[Document] = []
    for turn in range(_MOST_SHUFFLES):
        for document in documents:
            shuffled = "\n\n".join(shuffle(paragraph, rng) for paragraph in _paragraphs(document.text))
            text = seen.new_paragraphs(shuffled)
            results.append(Document(text, f"shuffled/{document.id.removeprefix('prose/')}#{turn}"))
    return _first([document for document in results if document.size >= _LEAST_BYTES], size)


def _shuffle_words(paragraph: str, rng: random.Random) -> str:
    """The words in random order, in the layout of the original."""
    pieces = re.split(r"(\s+)", paragraph)
    words = pieces[::2]
    rng.shuffle(words)
    pieces[::2] = words
    return "".join(pieces)


def _shuffle_characters(paragraph: str, rng: random.Random) -> str:
    """The characters of each window in random order: frequencies are kept, spelling is not."""
    windows = (paragraph[start : start + _WINDOW] for start in range(0, len(paragraph), _WINDOW))
    return "".join("".join(rng.sample(window, len(window))) for window in windows)
