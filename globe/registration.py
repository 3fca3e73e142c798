"""The quantisation method "globe" made known to transformers, without importing transformers.

Where transformers' loading code is imported already, at once; otherwise as soon as it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

LOADING = "transformers.modeling_utils"
"""The module of transformers that loads models: nothing is looked up among the quantisation methods before it."""


def register_with_transformers() -> None:
    """Import `globe.model.register`, which registers the format, when transformers is about to load models."""
    if LOADING in sys.modules:
        importlib.import_module("globe.model.register")
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the loading module as the other finders do, and has it followed by `globe.model.register`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != LOADING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Followed(spec.loader)
        return spec


class _Followed(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module("globe.model.register")
