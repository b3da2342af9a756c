"""Lists of schemes by purpose, which `--schemes` takes by their names.

portable      integers of 4 and 8 bits, activations left in 16 bits: what every kernel here, every
              export, `--tune` and slabs can do
cpu           integers of 3 to 8 bits and MXFP4, activations in 8-bit integers of 32 that share
              a power of two: products are exact sums of integers. The 8 bits are MXINT8, whose
              scales reach where those in float16 end
w4a4          floats with activations alike, as hardware with block scales multiplies them
weights-only  integers of 3 to 8 bits, activations left in 16 bits
"""

from __future__ import annotations

from collections.abc import Iterable

MENUS = {
    "portable": ("W4A16G64", "W8A16G64"),
    "cpu": (
        "W3G32xMXINT8",
        "MXFP4xMXINT8",
        "W4G32xMXINT8",
        "W5G32xMXINT8",
        "W6G32xMXINT8",
        "MXINT8",
    ),
    "w4a4": ("MXFP4", "NVFP4", "MXFP6", "MXFP8"),
    "weights-only": ("W3A16G32", "W4A16G32", "W5A16G32", "W6A16G32", "W8A16G32"),
}


def default_menu(on_cpu: bool, takes_few: bool = False) -> tuple[str, str]:
    """The menu to choose from where nothing is asked for, and why it is that one.

    takes_few  slabs or `--tune`, which not all formats are for
    """
    if takes_few:
        return "portable", "slabs and --tune take that"
    if on_cpu:
        return "cpu", "its products are exact and quick on a CPU"
    return "portable", "a GPU multiplies that"


def expanded(names: Iterable[str]) -> tuple[str, ...]:
    """The schemes that are named, those of a menu in its place, each once."""
    found = (scheme for name in names for scheme in MENUS.get(name.strip().lower(), (name,)))
    return tuple(dict.fromkeys(found))
