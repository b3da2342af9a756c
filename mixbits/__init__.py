"""mixbits: measure, allocate, pack and run language models in mixed precision.

    python -m mixbits.quantize MODEL --avg-bits 4.5 --out DIR
    model = mixbits.load(DIR)

Importing mixbits is cheap: torch and transformers are imported with the first name used. It is
also what lets transformers' own from_pretrained load DIR.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar

__version__ = "0.1.0"
__all__ = [
    "Plan",
    "Result",
    "Scores",
    "UsageError",
    "__version__",
    "allocate",
    "apply",
    "load",
    "measure",
    "parse_scheme",
    "quantize_model",
]

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from .api import Plan, Result, Scores, allocate, apply, measure, quantize_model
    from .checkpoint.loading import load
    from .errors import UsageError
    from .formats.schemes import parse_scheme

_HOME = {"load": "checkpoint.loading", "UsageError": "errors", "parse_scheme": "formats.schemes"}
_HOME |= dict.fromkeys(
    ("Plan", "Result", "Scores", "allocate", "apply", "measure", "quantize_model"), "api"
)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mixbits' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)


class _Registration:
    """Registers what we have for a package when that has been imported, and not before.

    Neither transformers nor peft finds it by itself, and importing them takes seconds.
    """

    modules: ClassVar = {
        "transformers.quantizers": ".checkpoint.transformers_quantizer",
        "peft": ".integrations.peft",
    }

    @classmethod
    def register(cls, name: str) -> None:
        from importlib import import_module

        import_module(cls.modules[name], __name__)

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


if all(getattr(finder, "__module__", None) != __name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, _Registration)
for _name in _Registration.modules:
    if _name in sys.modules:
        _Registration.register(_name)
