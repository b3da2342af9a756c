"""Pieces of HTML that show a plan or a frontier in a notebook; each brings its own style.

They load nothing and run nothing, and their style touches nothing outside of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ..formats.schemas import PlanFile, PlanUnit, check
from ..planning.plan import parse_ranges
from . import frontier, style
from .maps import BITS, heat_map, scheme_bits

_MOST_SLABS = 1 << 15  # of 32 columns, in the widest linear that a plan may have
_SCROLLS = Markup('<div style="overflow-x: auto">{}</div>')


def bits_map(plan: Mapping[str, Any]) -> str:
    """Where the bits go by a plan.json: bits per weight of every linear, blocks from left to right.

    Those of its schemes, scales counted. plan.json has no sizes: the linears of a cell, such as a
    block's experts, count alike. Raises UsageError for what is no plan, or has unknown schemes.
    """
    units = check(PlanFile, dict(plan), "plan").units
    bits = {name: _unit_bits(unit) for unit in units for name in unit.linears}
    chart, outside = heat_map("bits per weight", bits, {}, **BITS)
    parts = [_SCROLLS.format(chart.draw())] if chart else []
    return style.fragment(*parts, Markup("<p>{}</p>").format(outside) if outside else "")


def _unit_bits(unit: PlanUnit) -> float:
    """Bits per weight; of a unit in slabs, the mean over these."""
    if not unit.slabs:
        return scheme_bits(unit.scheme)
    counts = {name: len(parse_ranges(text, _MOST_SLABS)) for name, text in unit.slabs.items()}
    total = sum(counts.values())
    return sum(scheme_bits(name) * n for name, n in counts.items()) / max(1, total)


def frontier_chart(rows: Sequence[Mapping[str, Any]]) -> str:
    """What every budget buys, from `mixbits.planning.curve.rows`: predicted loss over bits."""
    return style.fragment(_SCROLLS.format(frontier.of_rows(rows).draw()))
