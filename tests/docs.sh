#!/usr/bin/env bash
# Build the documentation with its API reference; a warning is an error.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup_env.sh
source .venv/bin/activate

# In a plain theme, because the site's theme writes the list of all pages into every page, which takes minutes; and without
# viewcode, which copies the code and checks nothing.
sphinx-build -qW --keep-going -b html -D html_theme=basic \
    -D extensions=myst_parser,sphinx.ext.autodoc,sphinx.ext.napoleon,sphinxcontrib.mermaid docs build/docs-checked
