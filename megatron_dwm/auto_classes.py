"""Registration of the n-gram weighter with transformers' Auto classes, without importing transformers.

``import megatron_dwm`` is enough for ``AutoConfig`` and ``AutoModelForSequenceClassification`` to know it. Importing
transformers takes seconds, so this waits for the two modules with the Auto classes, and registers when they have
been imported, or at once if they already are.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

REGISTRATIONS = {
    "transformers.models.auto.configuration_auto": "megatron_dwm.weighting.ngram.configuration",
    "transformers.models.auto.modeling_auto": "megatron_dwm.weighting.ngram.model",
}
"""By module of transformers, the module of this package that registers there, with its function ``register``."""


def register_auto_classes() -> None:
    """Register now, or as soon as transformers is imported."""
    sys.meta_path.insert(0, _WaitingFinder())
    for name in REGISTRATIONS:
        if name in sys.modules:
            _register(sys.modules[name])


def _register(module: ModuleType) -> None:
    importlib.import_module(REGISTRATIONS[module.__name__]).register(module)


class _WaitingFinder(MetaPathFinder):
    """Finder of the awaited modules, which wraps their loaders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of an awaited module, with a loader that registers; None for all others."""
        if fullname not in REGISTRATIONS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """Loader that registers after a module's original loader."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module with its original loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then register."""
        self._loader.exec_module(module)
        _register(module)
