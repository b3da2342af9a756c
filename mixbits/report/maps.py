"""Maps of a model: a value for every linear, blocks across and modules down."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..formats.schemes import parse_scheme
from .charts import HeatMap

_BLOCK = re.compile(r"(?:^|\.)(\d+)\.(.+)")
BITS: dict[str, Any] = {"unit": "bits", "ramp": "blue", "digits": ".2f"}


def scheme_bits(name: str) -> float:
    """Bits per weight of a scheme, scales counted. Raises UsageError for one that is not known."""
    return parse_scheme(name).storage_bits(128, 4096) / (128 * 4096)


def _place(linear: str) -> tuple[int, str] | None:
    """`model.layers.3.mlp.experts.7.up_proj` -> (3, `experts.up_proj`); None outside blocks."""
    match = _BLOCK.search(linear)
    if match is None:
        return None
    parts = [part for part in match[2].split(".") if not part.isdigit()]
    return int(match[1]), ".".join(parts[1:] or parts)


def _cells(values: Mapping[str, float], weights: Mapping[str, int]) -> dict[Any, float]:
    """Weighted means over the linears of one (block, module); experts share a cell.

    Linears outside the blocks are keyed by their names.
    """
    sums: dict[Any, list[float]] = {}
    for name, value in values.items():
        weight = weights.get(name, 1)
        entry = sums.setdefault(_place(name) or name, [0.0, 0.0])
        entry[0] += value * weight
        entry[1] += weight
    return {place: total / weight for place, (total, weight) in sums.items()}


def heat_map(
    name: str, values: Mapping[str, float], weights: Mapping[str, int], **look: Any
) -> tuple[HeatMap | None, str]:
    """The map, None where no linear is in a block, and a sentence on those outside, or nothing.

    `weights` of each linear count in means of several; 1 where not given. `look` has the fields of
    `HeatMap` but for name and cells.
    """
    found = _cells(values, weights)
    inside = {place: v for place, v in found.items() if isinstance(place, tuple)}
    outside = [f"{place} {v:{look['digits']}}" for place, v in found.items() if place not in inside]
    said = f"Outside the blocks: {', '.join(outside)}." if outside else ""
    return HeatMap(name, inside, **look) if inside else None, said
