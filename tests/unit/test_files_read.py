"""Every module that reads files is in docs/security.md, in the row of what it reads."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Set

import pytest

from tests.paths import ROOT

PACKAGE = ROOT / "megatron_dwm"
READS = re.compile(
    # functions and methods, Python's and libraries'
    r"open|fdopen|read_\w+|load|load_\w+|safe_load|safe_open|from_pretrained|from_file|fromfile|\w*memmap\w*|frombuffer"
    r"|loadtxt|genfromtxt|decompress\w*|cat_file|copyfile|input_stream|run_path|url_to_fs"
    # objects that read when they are made, or later
    r"|GzipFile|BZ2File|LZMAFile|ZipFile|TarFile|ParquetFile|Unpickler|\w*FileSystemReader|ConfigParser|DictReader"
    r"|SentencePieceProcessor|TaskManager|IndexedDataset\w*|PackageLoader|FileSystemLoader|\w*DatasetBuilder"
)
"""Calls by which a file is read, whatever module the name belongs to."""
READING_BASES = re.compile(r"\w*(Reader|Unpickler|Dataset|DatasetBuilder)")
"""Classes of libraries whose methods read files."""
WRITES = re.compile(r"[wax]b?")
"""Modes in which ``open`` reads nothing."""


def reading_calls(tree: ast.Module, defined: Set[str] = frozenset()) -> list[str]:
    """Return the calls in a module that read files, and the classes that inherit such calls.

    Args:
        defined: names of functions, parameters and classes that the package defines. What they read is found where they
            are defined.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and READS.fullmatch(name := last_name(node.func)) and name not in defined:
            owner = ast.unparse(node.func).rpartition(".")[0]
            # A class of the package by its name, ``IndexFile.open``, and its parts that load what was read.
            is_method = (owner in defined and owner[0].isupper()) or (name == "load" and owner.startswith("self"))
            if not is_method and not is_writing(node):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.ClassDef):
            bases = [
                name for name in map(last_name, node.bases) if READING_BASES.fullmatch(name) and name not in defined
            ]
            found += [f"class {node.name}({name})" for name in bases]
    return found


def last_name(node: ast.expr) -> str:
    """Return the name at the end of an expression such as ``library.function``; empty if there is none."""
    return str(getattr(node, "attr", getattr(node, "id", "")))


def is_writing(call: ast.Call) -> bool:
    """Return whether a call of ``open`` only writes: by its mode, or by its flags as of ``os.open``."""
    values = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    modes = [value.value for value in values if isinstance(value, ast.Constant)]
    return any(WRITES.fullmatch(str(mode)) for mode in modes) or "os.O_WRONLY" in ast.unparse(call)


@functools.cache
def reading_modules() -> dict[str, list[str]]:
    """Return the modules that read files, below the package, with their calls."""
    trees = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    defined: set[str] = set()
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.AnnAssign):
            defined.add(last_name(node.target))
    defined -= {"open", "load", "read_text", "read_bytes", "read_metadata"}  # those of libraries have these names too
    return {name: calls for name, tree in trees.items() if (calls := reading_calls(tree, defined))}


def named_modules() -> set[str]:
    """Return the modules, and folders of them, in the last column of the page's table."""
    rows = [line for line in (ROOT / "docs" / "security.md").read_text().splitlines() if line.startswith("| ")]
    assert rows[0].endswith("| Read in |") and len({row.count(" | ") for row in rows}) == 1
    return {name for row in rows for name in re.findall(r"`([\w/]+(?:\.py|/))`", row.split(" | ")[-1])}


def test_every_module_that_reads_files_is_in_the_table():
    named = named_modules()
    missing = {
        module: calls
        for module, calls in reading_modules().items()
        if module not in named and f"{module.split('/')[0]}/" not in named
    }
    assert not missing, f"docs/security.md: add to the row of what they read, or a row with a test: {missing}"


def test_every_module_in_the_table_reads_files():
    folders = {f"{module.split('/')[0]}/" for module in reading_modules()}
    assert named_modules() - reading_modules().keys() - folders == set()


@pytest.mark.parametrize(
    "source",
    [
        "open(path)",
        "path.open('rb')",
        "path.open('r+b')",
        "open(path, 'a+')",
        "os.open(path, os.O_RDONLY)",
        "Path(name).read_text()",
        "np.load(file)",
        "pandas.read_csv(file)",
        "torch.load(file, weights_only=True)",
        "def later():\n    from x import load_file as f\n    return library.load_file(path)",
        "AutoModel.from_pretrained(folder)",
        "with safe_open(path, framework='pt') as file: pass",
        "pickle.Unpickler(file).load()",
        "dist_checkpointing.load(template, folder)",
        "zipfile.ZipFile(path)",
        "class Rows(datatrove.BaseDiskReader): pass",
    ],
)
def test_a_call_that_reads_is_found(source: str):
    assert reading_calls(ast.parse(source))


@pytest.mark.parametrize(
    "source", ["open(path, 'w')", "path.open('wb')", "open(p, mode='x')", "os.open(p, os.O_WRONLY | os.O_CREAT)"]
)
def test_a_call_that_writes_is_none(source: str):
    assert reading_calls(ast.parse(source)) == []
