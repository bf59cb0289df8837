"""Optional packages, which are installed by the extras of this distribution."""

from __future__ import annotations

import importlib

from megatron_dwm.errors import UserError

EXTRA_OF = {
    "accelerate": "eval",
    "lm_eval": "eval",
    "matplotlib": "report",
    "jinja2": "report",
    "plotly": "report",
    "data_selection": "data",
    "datatrove": "data",
    "orjson": "data",
    "pyarrow": "data",
    "pynvml": "gpu",
    "resiliparse": "data",
    "tiktoken": "tiktoken",
    "wandb": "wandb",
}
"""The extra of ``pyproject.toml`` that installs a package."""


def require_packages(needed_by: str, *modules: str) -> None:
    """Check that optional packages can be imported.

    Args:
        needed_by: the command or flag that needs them, as the user knows it.
        modules: keys of ``EXTRA_OF``.

    Raises:
        UserError: a package is missing; the message names the extra.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            message = f'{needed_by} needs {module}; pip install "megatron-dwm[{EXTRA_OF[module]}]"'
            raise UserError(message) from None
