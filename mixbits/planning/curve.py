"""The whole curve: what every budget buys, from one measurement.

Each point is the optimal plan of its budget, with its gap to the lower bound. One relaxation
serves all of them, so that a curve costs little more than a plan.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from .allocate import Allocation, Item, as_items, optimal
from .knapsack import Items, Relaxation

BREAKPOINTS = 100  # up to this many, every budget at which the relaxation is exact is a point

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """A budget in bits, and the plan that it buys."""

    budget: int
    allocation: Allocation


def frontier(items: Sequence[Item] | Items, points: int = 33) -> list[Point]:
    """Plans from the lowest to the highest budget of use, by rising budget.

    `points` budgets are evenly spaced, both ends among them; where the hulls have few steps,
    the budgets at which the relaxation is itself a plan are added. No point has more loss than
    one of a smaller budget.
    """
    if points < 2:
        raise UsageError(f"a curve needs at least 2 points: got {points}")
    table = as_items(items)
    if not len(table):
        return []
    relaxation = Relaxation(table)
    ends = int(relaxation.cost[0]), int(relaxation.cost[-1])  # more bits save nothing
    budgets = {ends[0] + (ends[1] - ends[0]) * i // (points - 1) for i in range(points)}
    if len(relaxation.cost) <= BREAKPOINTS:
        budgets |= set(relaxation.cost.tolist())
    found: list[Point] = []
    for budget in sorted(budgets):
        plan = optimal(relaxation, budget)
        # A search that gave up can miss what a smaller budget found; its own bound still holds.
        if found and found[-1].allocation.loss < plan.loss:
            old = found[-1].allocation
            plan = Allocation(old.choice, old.cost, old.loss, plan.lower_bound, plan.proven)
        found.append(Point(budget, plan))
    return found


def rows(
    points: Sequence[Point], describe: Callable[[Allocation], Row] | None = None
) -> list[dict[str, Any]]:
    """The curve as a table: budget and cost in bits, what `describe` adds, loss, bound and gap.

    `describe` may give `avg_bits`, `avg_bits_without_scales` and `predicted_bytes` of a plan.
    """
    return [
        {
            "budget_bits": point.budget,
            "cost_bits": point.allocation.cost,
            **(describe(point.allocation) if describe else {}),
            "predicted_loss": point.allocation.loss,
            "lower_bound": point.allocation.lower_bound,
            "gap": point.allocation.gap,
            "proven": point.allocation.proven,
        }
        for point in points
    ]


def to_csv(table: Sequence[Row]) -> str:
    """The rows with nine digits, under a heading."""
    keys = list(dict.fromkeys(key for row in table for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    for row in table:
        writer.writerow({k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()
