"""The relaxation equals its dual; large instances are solved; hard ones end, with their gap."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
from knapsacks import brute_force, close, random_items

from mixbits.planning import knapsack
from mixbits.planning.allocate import Item, allocate, as_items, optimal, total
from mixbits.planning.knapsack import Items, Relaxation


def dual(items: list[Item], budget: int) -> float:
    """The relaxation's loss the slow way: the best of all prices at which two options are equal."""
    prices = {0.0}
    for item in items:
        options = list(zip(item.costs, item.losses, strict=True))
        for (c, x), (d, y) in itertools.permutations(options, 2):
            if d > c and x > y:
                prices.add((x - y) / (d - c))
    return max(
        sum(min(x + p * c for c, x in zip(i.costs, i.losses, strict=True)) for i in items)
        - p * budget
        for p in prices
    )


def divisor(items: list[Item]) -> int:
    """Greatest common divisor of all differences of costs."""
    return int(np.gcd.reduce([c - i.costs[0] for i in items for c in i.costs])) or 1


@pytest.mark.parametrize("seed", range(0, 300, 100))
def test_the_relaxation_equals_its_dual_at_every_budget(seed: int) -> None:
    for instance in range(seed, seed + 100):
        rng = random.Random(instance)
        items = random_items(rng)
        relaxation = Relaxation(as_items(items))
        lowest, highest = as_items(items).cost_range()
        for budget in (lowest, *(rng.randint(lowest, highest) for _ in range(3)), highest + 5):
            found = relaxation.at(budget)
            # What no plan can spend is not spent: costs differ by multiples of the divisor.
            reachable = lowest + (budget - lowest) // divisor(items) * divisor(items)
            assert found.budget == reachable
            assert close(found.bound, dual(items, reachable)), (items, budget)
            cost, loss = as_items(items).total(found.choice)
            assert cost == found.cost <= budget
            assert close(found.bound, loss - found.price * (found.budget - cost))


def llama(schemes: tuple[int, ...], blocks: int, odd: bool = False) -> Items:
    """Slabs of `blocks` blocks of a 70B Llama: weights of q/k/v, o, gate/up, down that meet 32
    columns, in MX formats of these bits; log-normal losses. `odd` makes costs without a divisor.
    """
    rng = np.random.default_rng(0)
    readers = [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)]
    rows = np.concatenate([np.full(columns // 32, n) for n, columns in readers * blocks])
    bits = np.array(schemes)
    costs = rows[:, None] * (32 * bits + 8)
    if odd:
        costs = costs + rng.integers(0, 1000, costs.shape)
    spread = np.exp(rng.normal(0, 2, (len(rows), 1)) + rng.normal(0, 0.5, costs.shape))
    return Items(costs.astype(np.int64), rows[:, None] * spread * 4.0**-bits)


@pytest.mark.parametrize("odd", [False, True], ids=["shapes", "odd"])
@pytest.mark.parametrize("schemes", [(4, 8), (2, 3, 4, 6, 8)], ids=len)
def test_slabs_of_a_large_model_are_solved(schemes: tuple[int, ...], odd: bool) -> None:
    items = llama(schemes, blocks=20, odd=odd)
    lowest, highest = items.cost_range()
    relaxation = Relaxation(items)
    before = np.inf
    for share in (0, 0.003, 0.1, 0.5, 0.97, 1):
        budget = lowest + int((highest - lowest) * share)
        found = optimal(relaxation, budget)
        assert (found.cost, found.loss) == items.total(found.choice)
        assert found.cost <= budget
        assert found.proven or odd  # the shapes' costs have a large divisor
        assert 0 <= found.gap < 1e-4
        assert found.loss <= before
        before = found.loss
    assert found.loss == pytest.approx(items.losses.min(1).sum())


@pytest.mark.parametrize(("name", "limit"), [("STATES", 1), ("EFFORT", 4)])
def test_giving_up_leaves_a_plan_and_a_true_bound(
    name: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knapsack, name, limit)
    proofs = []
    for seed in range(200):
        rng = random.Random(seed)
        items = random_items(rng)
        budget = rng.randint(*as_items(items).cost_range())
        found, best = allocate(items, budget), brute_force(items, budget)
        assert found.cost <= budget
        assert found.loss <= as_items(items).total(Relaxation(as_items(items)).at(budget).choice)[1]
        assert found.lower_bound <= best or close(found.lower_bound, best)
        assert close(found.loss, best) or not found.proven
        proofs.append(found.proven)
    assert not all(proofs)
    assert sum(proofs) > 100  # most small instances need no more


def wide_items(rng: random.Random) -> list[Item]:
    """Up to 7 items whose losses span up to 24 decades, at costs that divide well or not at all."""
    kind, items = rng.randint(0, 3), []
    for index in range(rng.randint(1, 7)):
        options = range(rng.randint(1, 5))
        scale = rng.choice([1e-3, 1.0, 1e6])
        losses = [
            scale * rng.random() if kind == 0 else 10 ** rng.uniform(-12, 12) * (rng.random() < 0.9)
            for _ in options
        ]
        costs = [[rng.randint(1, 10**6), 4096 * rng.randint(1, 64)][kind > 1] for _ in options]
        if kind == 3:  # as plans are: the dearer, the better
            costs, losses = sorted(costs), sorted(losses, reverse=True)
        items.append(Item(str(index), tuple(costs), tuple(losses)))
    return items


def least_loss(items: list[Item], budget: int) -> float:
    """`brute_force` in numpy, at once for all plans."""
    costs, losses = np.zeros(1, np.int64), np.zeros(1)
    for item in items:
        costs = (costs[:, None] + np.array(item.costs)).ravel()
        losses = (losses[:, None] + np.array(item.losses)).ravel()
    return float(losses[costs <= budget].min())


# The largest of these losses, which no good plan has, once hid what the others differ by.
HIDDEN = [
    Item("a", (8192, 241664), (0.001, 0.000750465686542124)),
    Item(
        "b",
        (4096, 4096, 20480, 794624),
        (0.0, 957282.2068102208, 287847.56140988757, 10995.238516877114),
    ),
    Item("c", (12288, 1007616), (3.0, 0.31773784633167634)),
]


def test_proven_is_within_a_billionth_of_the_plan_whatever_else_is_lost() -> None:
    cases = [(HIDDEN, 382231)]
    for seed in range(1500):
        rng = random.Random(seed)
        items = wide_items(rng)
        cases.append((items, rng.randint(*as_items(items).cost_range())))
    for items, budget in cases:
        found, best = allocate(items, budget), least_loss(items, budget)
        assert found.proven and found.cost <= budget
        assert found.loss <= best * (1 + 1e-9), (items, budget)
        assert found.lower_bound <= best * (1 + 1e-12), (items, budget)
        lifted = [Item(i.name, i.costs, tuple(x - max(i.losses) for x in i.losses)) for i in items]
        assert total(items, allocate(lifted, budget).choice)[1] <= best + 1e-9 * sum(
            max(i.losses) for i in items
        )


def test_equal_slopes_of_one_item_are_one_step() -> None:
    items = as_items([Item("line", (1, 2, 3, 4), (3.0, 2.0, 1.0, 0.0))])
    relaxation = Relaxation(items)
    assert (relaxation.option.tolist(), relaxation.cost.tolist()) == ([3], [1, 4])
    assert [allocate(items, budget).choice for budget in (1, 2, 3, 4)] == [(0,), (1,), (2,), (3,)]


@pytest.mark.parametrize(
    ("costs", "losses", "message"),
    [
        (np.ones((2, 3), int), np.ones((2, 2)), r"\(2, 3\) and \(2, 2\)"),
        (np.ones((2, 0), int), np.ones((2, 0)), "an option at least"),
        (np.ones(2, int), np.ones(2), r"\[items, options\]"),
        (np.ones((2, 2)), np.ones((2, 2)), "costs must be int64.* got float64"),
        (np.ones((2, 2), int), np.ones((2, 2), np.float32), "got int64 and float32"),
        (np.ones((2, 2), int), np.array([[0, 1], [2, np.nan]]), r"got nan \(item 1, option 1\)"),
    ],
)
def test_bad_arrays_are_refused(costs: Any, losses: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Items(costs, losses)
