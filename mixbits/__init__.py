"""mixbits: measure, allocate, pack and run language models in mixed precision.

    python -m mixbits.quantize MODEL --avg-bits 4.5 --out DIR
    model = mixbits.load(DIR)

Importing mixbits is cheap: torch and transformers are imported with the first name used. It is
also what lets transformers' own from_pretrained load DIR.
"""

from __future__ import annotations

from ._registration import register

__version__ = "0.1.0"
__all__ = [
    "MixbitsConfig",
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

TYPE_CHECKING = False  # as of `typing`, which takes longer to import than all of this
if TYPE_CHECKING:
    from typing import Any

    from .api import Plan, Result, Scores, allocate, apply, measure, quantize_model
    from .checkpoint.loading import load
    from .checkpoint.transformers_quantizer import MixbitsConfig
    from .errors import UsageError
    from .formats.schemes import parse_scheme

_HOME = {
    "MixbitsConfig": "checkpoint.transformers_quantizer",
    "UsageError": "errors",
    "load": "checkpoint.loading",
    "parse_scheme": "formats.schemes",
}
_HOME |= dict.fromkeys(
    ("Plan", "Result", "Scores", "allocate", "apply", "measure", "quantize_model"), "api"
)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mixbits' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)


register()
