"""Lists of schemes by purpose, which `--schemes` takes by their names.

cpu           integers of 3 to 8 bits and MXFP4, activations in 8-bit integers of 32 that share
              a power of two: products are exact sums of integers
w4a4          floats with activations alike, as hardware with block scales multiplies them
weights-only  integers of 3 to 8 bits, activations left in 16 bits
"""

from __future__ import annotations

from collections.abc import Iterable

MENUS = {
    "cpu": (
        "W3G32xMXINT8",
        "MXFP4xMXINT8",
        "W4G32xMXINT8",
        "W5G32xMXINT8",
        "W6G32xMXINT8",
        "W8G32xMXINT8",
    ),
    "w4a4": ("MXFP4", "NVFP4", "MXFP6", "MXFP8"),
    "weights-only": ("W3A16G32", "W4A16G32", "W5A16G32", "W6A16G32", "W8A16G32"),
}


def expanded(names: Iterable[str]) -> tuple[str, ...]:
    """The schemes that are named, those of a menu in its place, each once."""
    found = (scheme for name in names for scheme in MENUS.get(name.strip().lower(), (name,)))
    return tuple(dict.fromkeys(found))
