"""Optional packages: what pretraining does not need is installed by an extra of this distribution."""

from __future__ import annotations

from importlib.util import find_spec

from megatron_dwm.errors import UserError

EXTRAS = {"report": ("matplotlib", "jinja2"), "corpora": ("resiliparse",), "tiktoken": ("tiktoken",)}
"""The modules that each extra of ``pyproject.toml`` installs."""


def require_extra(extra: str, needed_by: str) -> None:
    """Check that the packages of an extra are installed.

    Args:
        extra: a key of ``EXTRAS``.
        needed_by: the command or flag that needs it, as the user typed it.

    Raises:
        UserError: a package is missing.
    """
    for module in EXTRAS[extra]:
        if find_spec(module) is None:
            raise UserError(f"{needed_by} needs {module}, which is not installed; pip install 'megatron-dwm[{extra}]'")
