"""mixbits: measure, allocate, pack and run language models in mixed precision.

    python -m mixbits.quantize MODEL --avg-bits 4.5 --schemes MXFP4,MXFP8 --out DIR
    model = mixbits.load(DIR)

Importing mixbits is cheap: torch and transformers are imported with the first name used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["UsageError", "__version__", "load", "parse_scheme"]

if TYPE_CHECKING:
    from .checkpoint import load
    from .formats import UsageError, parse_scheme

_HOME = {"load": "checkpoint", "UsageError": "formats", "parse_scheme": "formats"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mixbits' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)
