"""README.md is short, links lead somewhere, and docs/architecture.md is true: files, layers, who takes all flags."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.paths import ROOT

PACKAGE = ROOT / "megatron_dwm"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
UNMAPPED = {".gitignore"}
GROUND = "ground"
"""Modules that lie directly in the package."""
LAYERS = [
    *(GROUND, "config", "runtime", "data", "corpora", "model", "weighting", "training", "plan", "analysis", "cli"),
    "benchmarks",
]
"""From the bottom to the top: a module imports modules of its own layer and of lower ones."""
NAMES_HIGHER_LAYERS = ("import_hooks.py", "cli/benchmark.py")
"""Files that import modules of higher layers by name, when another library is imported or the user asks for them."""


def tracked_files() -> list[str]:
    """Return the files of the repository, those not yet committed included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return sorted(path for path in set(listed) if path and (ROOT / path).exists())


def mapped_paths() -> list[str]:
    """Return the paths in the first column of the map's tables; a heading names the folder of the rows below it."""
    section = ARCHITECTURE.read_text().split("\n## Map\n")[1]
    folder, paths = "", []
    for row in section.splitlines():
        if row.startswith("### "):
            name = row.removeprefix("### ")
            folder = "" if name == "Root" else f"{name}/"
        elif row.startswith("| `"):
            paths += [folder + name for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    return paths


def missing_row(path: str) -> str:
    """Return what to add to the map for a file: the heading that it belongs under, and its line."""
    folder, _, name = path.rpartition("/")
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text())) if path.endswith(".py") else None
    purpose = " ".join((docstring or "what it is for").split("\n\n")[0].split()).rstrip(".")
    return f"### {folder or 'Root'}: | `{name}` | {purpose} |"


def imported_modules(source: str, *, in_strings: bool = True) -> Iterator[tuple[str, ...]]:
    """Yield the modules of the package that a file imports, anywhere in it, as parts below ``megatron_dwm``.

    Args:
        in_strings: whether the name of a module in a string, by which it can be imported later, is an import.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; name the package"
            # ``from megatron_dwm import config`` and ``from megatron_dwm.config import flags`` import a package and a
            # module, ``from megatron_dwm.config.flags import flag`` a name in one.
            parts = tuple(str(node.module).split("."))
            named = [(*parts, alias.name) if is_module((*parts, alias.name)) else parts for alias in node.names]
        elif isinstance(node, ast.Import):
            named = [tuple(alias.name.split(".")) for alias in node.names]
        elif (
            in_strings and isinstance(node, ast.Constant) and re.fullmatch(rf"{PACKAGE.name}(\.\w+)+", str(node.value))
        ):
            named = [tuple(str(node.value).split("."))]
        else:
            continue
        yield from (names[1:] for names in named if names[0] == PACKAGE.name)


def is_module(parts: tuple[str, ...]) -> bool:
    """Return whether a dotted name, given as its parts, is a module or a package of the repository."""
    return ROOT.joinpath(*parts).with_suffix(".py").is_file() or ROOT.joinpath(*parts, "__init__.py").is_file()


def layer_of(parts: tuple[str, ...]) -> str:
    """Return the layer of a module or file, given as its parts below ``megatron_dwm``."""
    return parts[0] if parts and (PACKAGE / parts[0]).is_dir() else GROUND


@functools.cache
def imports_between_layers() -> dict[tuple[str, str], list[str]]:
    """Return, by (imported, importing) layer, the imports as text."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).parts
        file = "/".join(parts)
        for module in imported_modules(path.read_text(), in_strings=file not in NAMES_HIGHER_LAYERS):
            pair = layer_of(module), layer_of(parts)
            # The bare package, ``from megatron_dwm import __version__``, belongs to no layer.
            if module and pair[0] != pair[1]:
                found[pair].append(f"{file} imports {'.'.join(module)}")
    return found


def without_implied(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the arrows of an acyclic graph without those that a chain of others already says."""

    def is_implied(start: str, end: str) -> bool:
        between = [b for a, b in edges if a == start and b != end]
        reached: set[str] = set()
        while between:
            layer = between.pop()
            if layer not in reached:
                reached.add(layer)
                between += [b for a, b in edges if a == layer]
        return end in reached

    return {(start, end) for start, end in edges if not is_implied(start, end)}


def drawn_arrows() -> set[tuple[str, str]]:
    """Return the arrows of the drawing of the layers."""
    drawing = ARCHITECTURE.read_text().split("## Layers")[1].split("```mermaid")[1].split("```")[0]
    return set(re.findall(r'^ *(\w+)(?:\["[^"]*"\])? --(?: "[^"]*" --)?> (\w+)$', drawing, re.MULTILINE))


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


def test_everything_on_the_map_is_there():
    paths = mapped_paths()
    assert len(paths) > 50
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert len(set(paths)) == len(paths)


def test_every_file_is_on_the_map():
    mapped = mapped_paths()
    folders = tuple(path for path in mapped if path.endswith("/"))
    files = [path for path in tracked_files() if not path.endswith("__init__.py") and path not in UNMAPPED]
    missing = [path for path in files if path not in mapped and not path.startswith(folders)]
    rows = "\n".join(missing_row(path) for path in missing)
    assert not missing, f"docs/architecture.md: add under the heading, with a plain purpose:\n{rows}"


def test_imports_run_down_the_layers():
    assert {layer for pair in imports_between_layers() for layer in pair} == set(LAYERS)
    upward = {
        pair: imports
        for pair, imports in imports_between_layers().items()
        if LAYERS.index(pair[0]) > LAYERS.index(pair[1])
    }
    assert upward == {}


@pytest.mark.parametrize(
    "source",
    [
        "from megatron_dwm.weighting import bilevel",
        "from megatron_dwm.weighting.bilevel import OuterUpdate",
        "import megatron_dwm.weighting.bilevel",
        "def later():\n    from megatron_dwm.weighting import bilevel as method",
        "importlib.import_module('megatron_dwm.weighting.bilevel')",
    ],
)
def test_a_module_is_found_however_it_is_imported(source: str):
    assert [*imported_modules(source)] == [("weighting", "bilevel")]


def test_a_whole_package_is_found_and_a_relative_import_is_refused():
    assert [*imported_modules("from megatron_dwm import training, __version__")] == [("training",), ()]
    with pytest.raises(AssertionError, match="line 1: a relative import"):
        list(imported_modules("from ..weighting import rules"))


def test_training_knows_nothing_of_weighting_but_its_door():
    imports = imports_between_layers()[("weighting", "training")]
    assert imports and [line for line in imports if not line.endswith("imports weighting.policy")] == []


def test_only_the_listed_modules_name_the_whole_configuration():
    """Each other part gets only the flags, and the sizes that follow from them, that it needs."""
    section = ARCHITECTURE.read_text().split("name the whole `RunConfig`:")[1].split("\n## ")[0]
    listed = [name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in row.split(", ")]
    naming = [path for path in PACKAGE.rglob("*.py") if re.search(r"\bRunConfig\b", path.read_text())]
    assert sorted(listed) == sorted(f"`{path.relative_to(PACKAGE)}`" for path in naming)


def test_the_drawing_of_the_layers_is_what_the_imports_say():
    assert drawn_arrows() == without_implied(set(imports_between_layers()))


@pytest.mark.parametrize(
    ("edges", "kept"),
    [
        ({("a", "b"), ("b", "c"), ("a", "c")}, {("a", "b"), ("b", "c")}),
        ({("a", "b"), ("a", "c")}, {("a", "b"), ("a", "c")}),
        ({("a", "b"), ("b", "c"), ("c", "d"), ("a", "d")}, {("a", "b"), ("b", "c"), ("c", "d")}),
    ],
)
def test_an_arrow_that_a_chain_says_is_not_drawn(edges: set[tuple[str, str]], kept: set[tuple[str, str]]):
    assert without_implied(edges) == kept


def heading_anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as they are made of their text on the web."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def linked_pages() -> Mapping[Path, list[str]]:
    """Return the Markdown pages of the repository, with the relative links in them."""
    pages = [ROOT / path for path in tracked_files() if path.endswith(".md")]
    links = {page: re.findall(r"\]\(([^)\s]+)\)", page.read_text()) for page in pages}
    return {page: [link for link in found if "://" not in link] for page, found in links.items()}


def test_relative_links_lead_somewhere():
    pages = linked_pages()
    assert len(pages) > 10
    dead = []
    for page, links in pages.items():
        for link in links:
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            if not target.exists() or (anchor and anchor not in heading_anchors(target)):
                dead.append(f"{page.relative_to(ROOT)}: {link}")
    assert dead == []
