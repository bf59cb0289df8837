"""What is done when certain modules of other libraries have been imported.

``import megatron_dwm`` is enough for transformers' Auto classes to know the n-gram weighter. Importing transformers
takes seconds, so registration waits for the two modules with the Auto classes. Likewise megatron-core is told, before
its own modules ask, that nothing is compiled on a machine without a GPU. If such a module has been imported before,
its function is called at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

HOOKS = {
    "transformers.models.auto.configuration_auto": "megatron_dwm.weighting.ngram.configuration:register",
    "transformers.models.auto.modeling_auto": "megatron_dwm.weighting.ngram.model:register",
    "megatron.core.jit": "megatron_dwm.runtime.device:leave_functions_uncompiled",
}
"""By module of a library, the function of this package that is called with it: ``module:function``."""


def install_import_hooks() -> None:
    """Call the functions now, or as soon as their modules are imported."""
    sys.meta_path.insert(0, _WaitingFinder())
    for name in HOOKS:
        if name in sys.modules:
            _call_hook(sys.modules[name])


def _call_hook(module: ModuleType) -> None:
    name, function = HOOKS[module.__name__].split(":")
    getattr(importlib.import_module(name), function)(module)


class _WaitingFinder(MetaPathFinder):
    """Finder of the modules that have hooks, which wraps their loaders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module that has a hook, with a loader that calls it; None for all others."""
        if fullname not in HOOKS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _HookedLoader(spec.loader)
        return spec


class _HookedLoader(Loader):
    """A module's original loader, and then its hook."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module with its original loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then call its hook."""
        self._loader.exec_module(module)
        _call_hook(module)
