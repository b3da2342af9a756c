"""The curve: monotone, complete, and within the bounds; as CSV."""

from __future__ import annotations

import csv
import io
import itertools
import random
from typing import Any

import pytest
from knapsacks import random_items

from mixbits.errors import UsageError
from mixbits.planning import curve, knapsack
from mixbits.planning.allocate import Allocation, Item, allocate, cost_range, total
from mixbits.planning.curve import frontier, rows, to_csv

THREE = [
    Item("a", (4, 8, 16), (9.0, 3.0, 0.0)),
    Item("b", (4, 8, 16), (5.0, 0.5, 0.0)),
    Item("c", (8,), (1.0,)),
]


@pytest.mark.parametrize("effort", [knapsack.EFFORT, 1], ids=["whole", "given up"])
def test_every_point_is_a_plan_of_its_budget_and_none_is_worse_than_a_smaller_one(
    effort: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knapsack, "EFFORT", effort)
    for seed in range(60):
        items = random_items(random.Random(seed))
        points = frontier(items, points=9)
        assert [p.budget for p in points] == sorted({p.budget for p in points})
        for point in points:
            plan = point.allocation
            assert plan.cost <= point.budget
            assert (plan.cost, plan.loss) == total(items, plan.choice)
            assert plan.lower_bound <= plan.loss
            assert plan.loss <= allocate(items, point.budget).loss  # not worse than alone
        for before, after in itertools.pairwise(points):
            assert after.allocation.loss <= before.allocation.loss
        assert points[0].budget == cost_range(items)[0]
        assert points[-1].allocation.loss == allocate(items, cost_range(items)[1]).loss


def test_a_worse_plan_of_a_larger_budget_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = iter([Allocation((0,), 4, 5.0, 4.0), Allocation((1,), 7, 6.0, 3.0)])
    monkeypatch.setattr(curve, "optimal", lambda relaxation, budget: next(plans))
    monkeypatch.setattr(curve, "BREAKPOINTS", 0)
    found = frontier([Item("a", (4, 8), (9.0, 0.0))], points=2)
    assert [p.allocation for p in found] == [
        Allocation((0,), 4, 5.0, 4.0),
        Allocation((0,), 4, 5.0, 3.0),  # the smaller budget's plan, this budget's bound
    ]


def test_budgets_are_evenly_spaced_and_few_breakpoints_are_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 16 bits at least, 40 at most; a's and b's second options come at 20 (b) and 24 (a).
    assert [p.budget for p in frontier(THREE, points=3)] == [16, 20, 24, 28, 32, 40]
    monkeypatch.setattr(curve, "BREAKPOINTS", 4)
    assert [p.budget for p in frontier(THREE, points=3)] == [16, 28, 40]


def test_a_curve_of_one_plan_or_of_nothing() -> None:
    fixed = frontier([Item("a", (4,), (1.0,)), Item("b", (4, 8), (1.0, 1.0))])
    assert [(p.budget, p.allocation.choice) for p in fixed] == [(8, (0, 0))]
    assert frontier([]) == []
    with pytest.raises(UsageError, match="at least 2 points: got 1"):
        frontier(THREE, points=1)


def describe(plan: Allocation) -> dict[str, Any]:
    return {"avg_bits": plan.cost / 3, "predicted_bytes": plan.cost // 8}


def test_csv_holds_what_the_points_hold() -> None:
    points = frontier(THREE, points=5)
    read = list(csv.DictReader(io.StringIO(to_csv(rows(points, describe)))))
    assert list(read[0]) == [
        *("budget_bits", "cost_bits", "avg_bits", "predicted_bytes"),
        *("predicted_loss", "lower_bound", "gap", "proven"),
    ]
    for row, point in zip(read, points, strict=True):
        plan = point.allocation
        assert (int(row["budget_bits"]), int(row["cost_bits"])) == (point.budget, plan.cost)
        assert float(row["avg_bits"]) == pytest.approx(plan.cost / 3, rel=1e-8)
        assert int(row["predicted_bytes"]) == plan.cost // 8
        assert float(row["predicted_loss"]) == pytest.approx(plan.loss, rel=1e-8)
        assert float(row["gap"]) == pytest.approx(plan.gap, rel=1e-8, abs=1e-12)
        assert row["proven"] == "True"
    assert "avg_bits" not in to_csv(rows(points))
