"""How Sphinx builds the documentation: the pages of this folder, and an API reference from the docstrings.

sphinx-build -W -b html docs build/docs
"""

import gc
import importlib.metadata
import os
import re
import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.ext.apidoc import main as apidoc

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
GENERATED = DOCS / "generated"
OTHER_PAGES = {
    "README.md": "project.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tests/README.md": "tests.md",
}
"""Pages outside this folder, and what their copies in the generated folder are called."""

gc.disable()  # nearly all that a build makes stays to its end, and looking for the rest takes a third of its time

sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is imported must not depend on the machine

project = "Megatron-DWM"
author = "The authors of Megatron-DWM"
release = version = importlib.metadata.version("megatron-dwm")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinxcontrib.mermaid",
]
exclude_patterns = ["README.md"]  # index.md begins with it
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False  # those of torch and of Python describe torch and Python
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"{project} {release}"


def relinked(text: str, origin: Path, page: Path) -> str:
    """Return the text of a page with its relative links pointing from another place.

    Args:
        origin: the folder that the links are relative to in the repository.
        page: the page in this folder that will hold the text.
    """

    def replaced(match: re.Match[str]) -> str:
        name, mark, anchor = match[1].partition("#")
        if not name or "://" in name:
            return match[0]
        target = (origin / name).resolve()
        copy = OTHER_PAGES.get(os.path.relpath(target, ROOT))
        if copy is not None:
            target = GENERATED / copy
        elif target == DOCS / "README.md":
            target = DOCS / "index.md"
        return f"]({os.path.relpath(target, page.parent)}{mark}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", replaced, text)


def write_generated_pages(app: Sphinx) -> None:
    """Write the pages that are not kept in the repository: one for each module, and copies of other folders' pages."""
    shutil.rmtree(GENERATED, ignore_errors=True)  # with pages of modules that are gone
    GENERATED.mkdir()
    for name, copy in OTHER_PAGES.items():
        origin = ROOT / name
        (GENERATED / copy).write_text(relinked(origin.read_text(), origin.parent, GENERATED / copy))
    options = ["--force", "--separate", "--module-first", "--no-toc"]
    apidoc([*options, "--output-dir", str(GENERATED / "api"), str(ROOT / "megatron_dwm")])


def read_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """Begin index.md with README.md, and let links to other folders' pages lead to their copies."""
    page = DOCS / f"{docname}.md"
    if docname == "index":
        source[0] = (DOCS / "README.md").read_text() + source[0]
    if page.is_file() and GENERATED not in page.parents:
        source[0] = relinked(source[0], page.parent, page)


def skip_labels(app: Sphinx, what: str, name: str, member: object, skip: bool, options: object) -> bool | None:
    """Leave out the labels that datatrove's steps have as class attributes: references to ``type`` would find them."""
    return True if name in ("type", "name") and isinstance(member, str) else None


def setup(app: Sphinx) -> None:
    """Register what this configuration adds to a build."""
    app.connect("autodoc-skip-member", skip_labels)
    app.connect("builder-inited", write_generated_pages)
    app.connect("source-read", read_page)
