"""Spend a bit budget where it hurts most: an exact multiple-choice knapsack, and the baselines.

Every unit (one linear, or several that must agree) takes exactly one of its options; an option
has a cost in bits and a predicted loss. We minimise the summed loss under a budget on the summed
cost.

    1. Each unit's options are thinned to their lower convex hull. Taking the hulls' steps in the
       order of loss saved per bit, until the budget is full, solves the linear relaxation: that
       gives a lower bound on the loss, a price per bit, and a feasible plan (Sinha and Zoltners,
       Operations Research 27(3), 1979).
    2. The price per bit bounds what any partial plan can still reach. A dynamic program over the
       units keeps the partial plans that are neither dominated (cheaper and better exist) nor
       already bound to end above the best plan known. Few survive, so that 80 units with eight
       options take milliseconds, whatever the costs' divisors.

The result is optimal up to a relative `TOLERANCE` on the loss, and comes with its gap to the
lower bound. Pure: no torch, no files, and the same answer on every run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .formats import UsageError

TOLERANCE = 1e-9  # plans within this share of the loss are not told apart


@dataclass(frozen=True)
class Item:
    """One unit: for every option its cost (integer bits) and its predicted loss."""

    name: str
    costs: tuple[int, ...]
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.costs or len(self.costs) != len(self.losses):
            raise ValueError(
                f"an item needs as many costs as losses, at least one: got {len(self.costs)} "
                f"costs and {len(self.losses)} losses ({self.name})"
            )
        if not np.isfinite(self.losses).all():
            raise ValueError(f"losses must be finite: got {self.losses} ({self.name})")


@dataclass(frozen=True)
class Allocation:
    """`choice[i]` is the option taken for item i; `lower_bound` is that of the relaxation."""

    choice: tuple[int, ...]
    cost: int
    loss: float
    lower_bound: float

    @property
    def gap(self) -> float:
        """Loss above the lower bound, as a share of the loss (0 is proven optimal)."""
        return (self.loss - self.lower_bound) / self.loss if self.loss > 0 else 0.0


class BudgetError(UsageError):
    """The budget is below the cheapest plan (`lowest`) in bits; `highest` is the dearest one."""

    def __init__(self, budget: int, lowest: int, highest: int) -> None:
        super().__init__(
            f"the budget must be at least {lowest} bits: got {budget} "
            f"(the dearest plan takes {highest})"
        )
        self.budget, self.lowest, self.highest = budget, lowest, highest


def total(items: Sequence[Item], choice: Sequence[int]) -> tuple[int, float]:
    """Summed cost (bits) and loss of a choice."""
    cost = sum(item.costs[c] for item, c in zip(items, choice, strict=True))
    loss = sum(item.losses[c] for item, c in zip(items, choice, strict=True))
    return cost, float(loss)


def cost_range(items: Sequence[Item]) -> tuple[int, int]:
    """Cost in bits of the cheapest and of the dearest plan."""
    return sum(min(i.costs) for i in items), sum(max(i.costs) for i in items)


def _check_budget(items: Sequence[Item], budget: int) -> None:
    lowest, highest = cost_range(items)
    if budget < lowest:
        raise BudgetError(budget, lowest, highest)


def _hull(item: Item) -> list[int]:
    """Options on the lower convex hull of (cost, loss), cheapest first, loss decreasing."""
    hull: list[int] = []
    order = sorted(range(len(item.costs)), key=lambda o: (item.costs[o], item.losses[o]))
    for option in order:
        if hull and item.losses[option] >= item.losses[hull[-1]]:
            continue
        while len(hull) >= 2 and _slope(item, hull[-1], option) >= _slope(item, hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(item: Item, a: int, b: int) -> float:
    """Loss saved per bit on the way from option a to the dearer option b."""
    return (item.losses[a] - item.losses[b]) / (item.costs[b] - item.costs[a])


def relax(items: Sequence[Item], budget: int) -> tuple[list[int], float, float]:
    """Solve the linear relaxation: a feasible choice, the price per bit, the lower bound."""
    hulls = [_hull(item) for item in items]
    choice = [hull[0] for hull in hulls]
    steps = [
        (-_slope(item, a, b), i, a, b)
        for i, (item, hull) in enumerate(zip(items, hulls, strict=True))
        for a, b in pairwise(hull)
    ]
    cost, loss = total(items, choice)
    price, bound = 0.0, None
    blocked: set[int] = set()
    for negative_slope, i, a, b in sorted(steps):
        extra = items[i].costs[b] - items[i].costs[a]
        if i not in blocked and cost + extra <= budget:
            choice[i], cost, loss = b, cost + extra, loss + extra * negative_slope
            continue
        if bound is None:  # the first step that does not fit is taken in part by the relaxation
            price = -negative_slope
            bound = loss - (budget - cost) * price
        blocked.add(i)  # a later step of this item would presume the one left out
    return choice, price, loss if bound is None else bound


def optimal(items: Sequence[Item], budget: int) -> Allocation:
    """The plan of least loss whose cost is at most `budget` bits. Raises BudgetError."""
    _check_budget(items, budget)
    greedy, price, lower_bound = relax(items, budget)
    best = total(items, greedy)[1]
    slack = TOLERANCE * (abs(best) + max((abs(x) for i in items for x in i.losses), default=0.0))
    # What the items still to come cost at least, in loss at the price; index i: items i, i+1, ...
    priced = [min(x + price * c for x, c in zip(i.losses, i.costs, strict=True)) for i in items]
    to_come = np.concatenate([np.cumsum(np.array(priced)[::-1])[::-1], [0.0]])
    cheapest = np.concatenate([np.cumsum([min(i.costs) for i in items][::-1])[::-1], [0]])
    costs, losses = np.zeros(1, np.int64), np.zeros(1)
    trail: list[np.ndarray] = []  # per item: for each kept state, parent state * options + option
    for i, item in enumerate(items):
        new_costs = (costs[:, None] + np.array(item.costs, np.int64)).ravel()
        new_losses = (losses[:, None] + np.array(item.losses)).ravel()
        reachable = new_losses + to_come[i + 1] - price * (budget - new_costs) < best - slack
        keep = np.flatnonzero(reachable & (new_costs + int(cheapest[i + 1]) <= budget))
        order = keep[np.lexsort((new_losses[keep], new_costs[keep]))]
        sorted_losses = new_losses[order]
        before = np.minimum.accumulate(np.concatenate([[np.inf], sorted_losses[:-1]]))
        order = order[sorted_losses < before]
        costs, losses = new_costs[order], new_losses[order]
        trail.append(order)
    if not len(costs) or losses.min() >= best:  # nothing better than the greedy plan exists
        return Allocation(tuple(greedy), *total(items, greedy), lower_bound)
    choice: list[int] = []
    state = int(np.argmin(losses))
    for item, parents in zip(reversed(items), reversed(trail), strict=True):
        state, option = divmod(int(parents[state]), len(item.costs))
        choice.append(option)
    choice.reverse()
    return Allocation(tuple(choice), *total(items, choice), lower_bound)


def _one_option(items: Sequence[Item], budget: int, seed: int) -> list[int]:
    """Every unit takes the same option: the dearest one that fits."""
    # Fixed units have one option only; the others vary together.
    common = max(len(item.costs) for item in items)
    plans = [[min(o, len(item.costs) - 1) for item in items] for o in range(common)]
    fitting = [p for p in plans if total(items, p)[0] <= budget]
    if not fitting:  # though a mixed plan would fit
        costs = [total(items, plan)[0] for plan in plans]
        raise BudgetError(budget, min(costs), max(costs))
    return max(fitting, key=lambda p: total(items, p)[0])


def _upgrade(items: Sequence[Item], budget: int, order: Sequence[int]) -> list[int]:
    """All units at their cheapest option; then, in order, each that fits at its dearest."""
    choice = [int(np.argmin(item.costs)) for item in items]
    cost = total(items, choice)[0]
    for i in order:
        dearest = int(np.argmax(items[i].costs))
        extra = items[i].costs[dearest] - items[i].costs[choice[i]]
        if cost + extra <= budget:
            choice[i], cost = dearest, cost + extra
    return choice


def _head(items: Sequence[Item], budget: int, seed: int) -> list[int]:
    return _upgrade(items, budget, range(len(items) - 1, -1, -1))


def _tail(items: Sequence[Item], budget: int, seed: int) -> list[int]:
    return _upgrade(items, budget, range(len(items)))


def _random(items: Sequence[Item], budget: int, seed: int) -> list[int]:
    return _upgrade(items, budget, random.Random(seed).sample(range(len(items)), len(items)))


_BASELINES: dict[str, Callable[[Sequence[Item], int, int], list[int]]] = {
    "uniform": _one_option,
    "head": _head,
    "tail": _tail,
    "random": _random,
}
STRATEGIES = ("optimal", *_BASELINES)


def allocate(
    items: Sequence[Item], budget: int, strategy: str = "optimal", seed: int = 0
) -> Allocation:
    """Choose one option per item within `budget` bits.

    `items` are in the model's order, embedding first; each item's options in a common order.

    strategy
        optimal  least summed loss
        uniform  the same option everywhere: the dearest that fits
        head     units near lm_head get their dearest option, the others their cheapest
        tail     the same for units near the embedding
        random   the same in an order drawn with `seed`

    Raises BudgetError if even the cheapest plan is above the budget, UsageError for an unknown
    strategy.
    """
    if strategy not in STRATEGIES:
        raise UsageError(f"strategy must be one of {', '.join(STRATEGIES)}: got {strategy!r}")
    if not items:
        return Allocation((), 0, 0.0, 0.0)
    if strategy == "optimal":
        return optimal(items, budget)
    _check_budget(items, budget)
    choice = _BASELINES[strategy](items, budget, seed)
    return Allocation(tuple(choice), *total(items, choice), relax(items, budget)[2])
