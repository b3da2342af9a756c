"""The frontier: what every budget buys, as a chart, beside the plans that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import printable
from .charts import Mark, Plot, plan_kind
from .report import Baseline
from .tables import is_number

BITS = "bits per weight, everything counted"


def frontier(
    line: Sequence[tuple[Any, Any]],
    plans: Sequence[Baseline] = (),
    x_name: str = BITS,
    loss_name: str = "predicted loss",
    **look: Any,
) -> Plot:
    """The best plan of every budget as (bits, loss), and `plans` beside it.
    What is no number, and a loss of 0, which a logarithmic axis does not have, is left out. `look`
    has other fields of `Plot`.
    """
    shown = [(x, y) for x, y in line if is_number(x) and is_number(y) and y > 0]
    marks = [
        Mark(bits, loss, plan_kind(name), f"{name}: {bits:.4f} bits, predicted loss {loss:.4g}")
        for name, bits, loss in _drawn(plans)
    ]
    return Plot("the curve", x_name, loss_name, marks, shown, **look)


def _drawn(plans: Sequence[Baseline]) -> list[tuple[str, float, float]]:
    """Name, bits and loss of what can be drawn."""
    return [
        (p.name, p.avg_bits, p.predicted_loss)
        for p in plans
        if is_number(p.avg_bits) and is_number(p.predicted_loss) and p.predicted_loss > 0
    ]


def of_rows(rows: Sequence[Mapping[str, Any]], plans: Sequence[Baseline] = (), **look: Any) -> Plot:
    """The frontier of `mixbits.planning.curve.rows`: over bits per weight where they have it.

    Points of the line are marked, and a legend names the plans.
    """
    known = bool(rows) and "avg_bits" in rows[0]
    line = [(row["avg_bits" if known else "cost_bits"], row["predicted_loss"]) for row in rows]
    names = ["frontier", *(name for name, *_ in _drawn(plans))]
    kinds = [plan_kind(""), *map(plan_kind, names[1:])]
    legend = list(zip(kinds, map(printable, names), strict=True))
    return frontier(line, plans, BITS if known else "bits", dots=True, legend=legend, **look)
