"""Makes transformers open slimlm's checkpoints after `import slimlm`, without importing transformers for it.

transformers takes seconds to import, and programs that import slimlm (the command line's help, for example) may never open a
model. Config and quantizer therefore are registered when transformers' own tables of them are imported, or at once where they
already are.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AFTER = {
    "transformers.models.auto.configuration_auto": "slimlm.inference.hf_config",
    "transformers.quantizers.auto": "slimlm.inference.hf_quantizer",
}
"""Modules of transformers, and modules of slimlm that are imported after them."""


def register() -> None:
    """Register slimlm's format with transformers, now or as soon as transformers is imported."""
    sys.meta_path.insert(0, _Finder())
    for theirs, ours in _AFTER.items():
        if theirs in sys.modules:
            importlib.import_module(ours)


class _Finder(MetaPathFinder):
    """Finds transformers' modules, and imports slimlm's after them."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _AFTER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, _AFTER[name])
        return spec


class _Loader(Loader):
    """Loads a module with its own loader, which it restores, and then imports another module."""

    def __init__(self, own: Loader, then: str) -> None:
        self.own, self.then = own, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.own
        if module.__spec__ is not None:
            module.__spec__.loader = self.own
        self.own.exec_module(module)
        importlib.import_module(self.then)
