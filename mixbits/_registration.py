"""What mixbits has for another package is registered when that is imported, whoever imports it.

transformers loads a packed folder only where its own table of quantizers has ours, and peft puts
adapters beside packed linears only where ours has been shown to it; neither looks for anybody's
by itself. To import them for that in `import mixbits` would take seconds. To wait for a function of
ours would be too late, for `from_pretrained` calls none before it has decided. So a finder stands
before Python's own and waits for these two modules: it finds what Python finds, and once that has
run, imports our module, which registers itself. Every other import passes it by.

This runs with `import mixbits`, which must be quick: even `typing` is not imported.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any, ClassVar

_PACKAGE = __name__.rpartition(".")[0]


class _Finder:
    """An entry of `sys.meta_path`: the usual spec, with ours imported once the module has run."""

    modules: ClassVar[dict[str, str]] = {
        "transformers.quantizers": ".checkpoint.transformers_quantizer",
        "peft": ".integrations.peft",
    }

    @classmethod
    def register(cls, name: str) -> None:
        from importlib import import_module

        import_module(cls.modules[name], _PACKAGE)

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in cls.modules:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            cls.register(name)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Wait for the packages, once in a process; with those that are there already, register now."""
    if all(getattr(finder, "__module__", None) != __name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder)
    for name in _Finder.modules:
        if name in sys.modules:
            _Finder.register(name)
