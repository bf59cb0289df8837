"""The built-in corpus, made from the interpreter's standard library.

Nothing is downloaded, and nothing that is read is imported: the library's files are parsed. Good text is ``prose``, the
documentation; ``code`` and ``comments`` are other real text; ``shuffled`` is bad text: documentation that no other
source holds, with its words or its characters in random order. No text is in two documents, so no part or source leaks
into another.
"""

from __future__ import annotations

import ast
import gc
import inspect
import io
import random
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from megatron_dwm.corpora.corpus import (
    MIN_BYTES,
    Corpus,
    CorpusConfig,
    Document,
    SeenTexts,
    first,
    paragraphs,
    split,
    with_progress,
)
from megatron_dwm.errors import UserError

# Other packages; tests, which not every interpreter has; tables.
_NOT_READ = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
_TOPICS = "pydoc_data/topics.py"
_MIN_WORDS = 8  # shorter statements may occur twice, and shorter comments are left out
_TABLE = 1000  # a module-level assignment of at least this many characters is a table, not code
_SHUFFLED_FRACTION = 0.3  # of the prose outside target and test
_MAX_SHUFFLES = 10  # of one document
_WINDOW = 8  # characters that are put in random order together

_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Disable the garbage collector: its repeated passes over all syntax trees would take a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_without_collector()
def standard_library_corpus(config: CorpusConfig, library: Path | None = None) -> Corpus:
    """Build the corpus of ``library``, by default the running interpreter's standard library.

    Raises:
        UserError: the library's sources are not there, or are too few for the sizes asked for.
    """
    root = library or Path(sysconfig.get_path("stdlib"))
    seen = SeenTexts()
    modules = list(_modules(root))
    prose = []
    for module in with_progress(modules, "docstrings"):
        texts = _topics(module.tree) if module.name == _TOPICS else [(module.name, docstrings(module.tree))]
        prose += [Document(seen.new_paragraphs(text), f"prose/{name}") for name, text in texts]
    comments = [
        Document(seen.new_paragraphs(_comments(module.source)), f"comments/{module.name}")
        for module in with_progress(modules, "comments")
    ]
    code = [
        Document(_Code(seen).text(module.tree), f"code/{module.name}")
        for module in with_progress(modules, "code")
        if module.name != _TOPICS
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
    prose: list[Document], comments: list[Document], code: list[Document], config: CorpusConfig, seen: SeenTexts
) -> Corpus:
    """Split the sources into parts of the configured sizes, and make bad text of a fraction of the prose."""
    rng = random.Random(config.seed)
    corpus = {
        "prose": split(prose, config.heldout_bytes, rng),
        "code": split(code, config.heldout_bytes, rng),
        "comments": split(comments, config.heldout_bytes, rng),
    }
    corpus["prose"]["train"], base = _divide(corpus["prose"]["train"], _SHUFFLED_FRACTION)
    corpus["shuffled"] = {
        part: _shuffled(documents, config, config.code_bytes if part == "train" else config.heldout_bytes, seen, rng)
        for part, documents in split(base, sum(document.size for document in base) // 8, rng).items()
    }
    for name, most in (("prose", config.prose_bytes), ("comments", config.prose_bytes), ("code", config.code_bytes)):
        corpus[name]["train"] = first(corpus[name]["train"], most)
    return corpus


class _Module(NamedTuple):
    """A file of the library: its path below the library's folder, its text, its syntax tree."""

    name: str
    source: bytes
    tree: ast.Module


def _modules(root: Path) -> Iterator[_Module]:
    """Yield the modules below ``root``, in the order of their paths."""
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name, path in sorted(paths.items()):
        # _sysconfigdata holds how this interpreter was built, which differs between machines.
        if _NOT_READ & set(name.split("/")) or name.startswith("_sysconfigdata"):
            continue
        source = path.read_bytes()
        tree = parse_module(source)
        if tree is not None:
            yield _Module(name, source, tree)


def parse_module(source: bytes) -> ast.Module | None:
    """Return the syntax tree, or None for source that does not parse (samples of broken or old code)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            return ast.parse(source)
    except (SyntaxError, ValueError):
        return None


def _topics(tree: ast.Module) -> list[tuple[str, str]]:
    """Return name and text of the entries of pydoc's dictionary of topics."""
    dictionaries = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
    ]
    return [(f"topic:{name}", _prose(text)) for node in dictionaries for name, text in ast.literal_eval(node).items()]


def docstrings(tree: ast.Module) -> str:
    """Return the documentation of a module, its classes and its functions."""
    texts = (
        ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, *_FUNCTION))
    )
    return _prose("\n\n".join(text for text in texts if text))


def _prose(text: str) -> str:
    """Return ``text`` without examples of interpreter sessions, and without what UTF-8 cannot encode."""
    text = text.encode("utf-8", "ignore").decode()
    return "\n\n".join(paragraph for paragraph in paragraphs(text) if ">>>" not in paragraph)


def _comments(source: bytes) -> str:
    """Return the longer comments, without their marks; those on consecutive lines are one."""
    blocks: list[list[str]] = []
    below = (-1, -1)  # the place of a comment that would continue the last block
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
    return text if len(text.split()) >= _MIN_WORDS else ""


class _Code(ast.NodeTransformer):
    """A transformer that removes docstrings and statements with text seen before, and marks the rest as seen."""

    def __init__(self, seen: SeenTexts) -> None:
        self._seen = seen

    def text(self, tree: ast.Module) -> str:
        """Return the source of the module; its tree is changed."""
        self.generic_visit(tree)
        tree.body = [statement for statement in tree.body if self._is_kept(statement)]
        return ast.unparse(tree)

    def visit(self, node: ast.AST) -> ast.AST:
        # Expressions contain no statements.
        return node if isinstance(node, ast.expr) else super().visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        # A string that is a statement documents what is above it.
        is_string = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return ast.Pass() if is_string else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.stmt:
        return self._definition(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.stmt:
        return self._definition(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.stmt:
        return self._definition(node)

    def _definition(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> ast.stmt:
        self.generic_visit(node)  # the inside first: a class is compared by what is left of it
        node.body = [statement for statement in node.body if not isinstance(statement, ast.Pass)] or [ast.Pass()]
        return node if self._is_new(node.body) else ast.Pass()

    def _is_kept(self, statement: ast.stmt) -> bool:
        """Return whether a statement of the module stays."""
        if isinstance(statement, (ast.ClassDef, *_FUNCTION)):
            return True  # compared when it was visited
        if isinstance(statement, ast.Pass):
            return False
        is_code = not isinstance(statement, (ast.Assign, ast.AnnAssign)) or len(ast.unparse(statement)) < _TABLE
        return is_code and self._is_new([statement])

    def _is_new(self, body: list[ast.stmt]) -> bool:
        text = "\n".join(ast.unparse(statement) for statement in body)
        if len(re.findall(r"\w+", text)) < _MIN_WORDS:
            return True
        strings = [
            node.value
            for statement in body
            for node in ast.walk(statement)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        is_copied = any(
            len(paragraph.split()) >= _MIN_WORDS and paragraph in self._seen
            for string in strings
            for paragraph in paragraphs(string)
        )
        return not is_copied and self._seen.add(text)


def _divide(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Divide the documents in two; the second part has at most ``fraction`` of the bytes."""
    second = first(documents, int(fraction * sum(document.size for document in documents)))
    return documents[len(second) :], second


def _shuffled(
    documents: list[Document], config: CorpusConfig, size: int, seen: SeenTexts, rng: random.Random
) -> list[Document]:
    """Return at most ``size`` bytes of the documents with each paragraph shuffled, in several orders if needed."""
    shuffle = _shuffle_words if config.shuffle == "words" else _shuffle_characters
    results: list[Document] = []
    for turn in range(_MAX_SHUFFLES):
        for document in documents:
            shuffled = "\n\n".join(shuffle(paragraph, rng) for paragraph in paragraphs(document.text))
            text = seen.new_paragraphs(shuffled)
            results.append(Document(text, f"shuffled/{document.id.removeprefix('prose/')}#{turn}"))
    return first([document for document in results if document.size >= MIN_BYTES], size)


def _shuffle_words(paragraph: str, rng: random.Random) -> str:
    """Shuffle the words; the white space stays in place."""
    pieces = re.split(r"(\s+)", paragraph)
    words = pieces[::2]
    rng.shuffle(words)
    pieces[::2] = words
    return "".join(pieces)


def _shuffle_characters(paragraph: str, rng: random.Random) -> str:
    """Shuffle the characters within each window: their frequencies are kept, the spelling is not."""
    windows = (paragraph[start : start + _WINDOW] for start in range(0, len(paragraph), _WINDOW))
    return "".join("".join(rng.sample(window, len(window))) for window in windows)
