"""A multiple-choice knapsack of hundreds of thousands of items: its relaxation, and its optimum.

Every item takes exactly one option; an option has a cost and a loss; the summed cost must stay
within a budget and the summed loss be least.

    1. Each item's options are thinned to their lower convex hull. Taking the hulls' steps in the
       order of loss saved per unit of cost, until the budget is full, solves the linear
       relaxation (Sinha and Zoltners, Operations Research 27(3), 1979). One sort serves every
       budget. It gives a feasible plan, a lower bound, and the *price* of a unit of cost.
    2. At that price every other option of an item has a *regret* >= 0: what taking it adds to
       loss + price * cost. A plan ends above the lower bound by exactly the sum of its regrets
       plus price * (budget left over), so an option whose regret exceeds the gap of the best
       plan known is in no better plan. Few items keep an alternative: the core.
    3. A dynamic program takes the core's items in the order of their least regret (after
       Pisinger's minimal core, EJOR 83(2), 1995). Its states are sets of deviations from the
       relaxation's plan; every state within the budget is a complete plan, so that the gap, and
       with it the core, shrink as it goes. It ends when the next regret exceeds the gap: then
       the plan is optimal. On instances that refuse to end, the states of least regret go on,
       and the plan comes with its gap.
    4. An option that alone loses more than a whole plan is in no better one. Where it loses so
       much that floats could hide by it what plans differ by, it goes, and 1 to 3 begin again.

Pure: numpy only, and the same answer on every run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 1e-9  # plans within this share of the loss are not told apart
VAST = 1e3  # times a plan's loss: differences of so large losses are exact to 1e-12 of it
NEGLIGIBLE = 1e-6  # a gap, as a share of the loss, that is not worth following STATES for
STATES = 1 << 16  # deviations that the dynamic program follows at once
EFFORT = 1 << 22  # and in all: bounds time (a second) and memory (4 bytes each)

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Items:
    """All items' options: `costs` int64 and `losses` float64, both [items, options].

    An item with fewer options than others repeats its last one.
    """

    costs: Integers
    losses: Floats

    def __post_init__(self) -> None:
        if self.costs.ndim != 2 or not self.costs.shape[1] or self.costs.shape != self.losses.shape:
            raise ValueError(
                "costs and losses must be [items, options], with an option at least: "
                f"got {self.costs.shape} and {self.losses.shape}"
            )
        if self.costs.dtype != np.int64 or self.losses.dtype != np.float64:
            raise ValueError(
                "costs must be int64 and losses float64: "
                f"got {self.costs.dtype} and {self.losses.dtype}"
            )
        if not np.isfinite(self.losses).all():
            item, option = np.argwhere(~np.isfinite(self.losses))[0].tolist()
            raise ValueError(
                f"losses must be finite: got {self.losses[item, option]} "
                f"(item {item}, option {option})"
            )

    def __len__(self) -> int:
        return len(self.costs)

    def cost_range(self) -> tuple[int, int]:
        """Cost of the cheapest and of the dearest plan."""
        return int(self.costs.min(1).sum()), int(self.costs.max(1).sum())

    def total(self, choice: Sequence[int] | Integers) -> tuple[int, float]:
        """Summed cost and loss of a choice; the loss is the exact sum, rounded once."""
        rows = np.arange(len(self))
        picked = np.asarray(choice, np.int64)
        return int(self.costs[rows, picked].sum()), math.fsum(self.losses[rows, picked].tolist())


@dataclass(frozen=True, eq=False)
class Relaxed:
    """The relaxation at one budget: a feasible `choice` [items], the price, the lower bound."""

    budget: int  # the largest cost within the budget that sums of options can reach
    choice: Integers
    cost: int
    price: float
    bound: float


class Relaxation:
    """The linear relaxation at every budget: hull steps in the order a growing budget buys them.

    Step s lets `item[s]` go to `option[s]`, saving `slope[s]` of loss per unit of cost. After s
    steps the plan costs `cost[s]`; before the first, every item is at `cheapest`, the best of its
    options of least cost.
    """

    def __init__(self, items: Items) -> None:
        self.items = items
        self.cheapest, steps = _hull_steps(items)
        self.item, self.option, self.slope, extra = steps
        self.cost = items.total(self.cheapest)[0] + np.append(0, np.cumsum(extra))

    @cached_property
    def _divisor(self) -> int:
        """Costs of plans differ by multiples of this."""
        steps = np.unique(self.items.costs - self.items.costs[:, :1])
        return int(np.gcd.reduce(steps, initial=0)) or 1

    def at(self, budget: int) -> Relaxed:
        """Solve for one budget, at least the cost of the cheapest plan."""
        lowest = int(self.cost[0])
        budget = lowest + (budget - lowest) // self._divisor * self._divisor
        taken = int(np.searchsorted(self.cost, budget, side="right")) - 1
        choice = self.cheapest.copy()
        choice[self.item[:taken]] = self.option[:taken]  # the last step of an item stands
        cost, loss = self.items.total(choice)
        price = float(self.slope[taken]) if taken < len(self.slope) else 0.0
        return Relaxed(budget, choice, cost, price, loss - price * (budget - cost))


def _hull_steps(items: Items) -> tuple[Integers, tuple[Any, ...]]:
    """Each item's cheapest option, and all hull steps, steepest first.

    Walks every item's hull at once: from where it is to the option that saves most per unit of
    cost, the farthest of equals.
    """
    costs, losses = items.costs, items.losses
    rows = np.arange(len(items))
    least = costs == costs.min(1, keepdims=True)
    cheapest = np.where(least, losses, np.inf).argmin(1)
    found: list[tuple[Any, ...]] = [(rows[:0], rows[:0], np.zeros(0), rows[:0])]
    here, reached = cheapest, np.full(len(items), np.inf)
    while len(rows):
        extra = costs[rows] - costs[rows, here][:, None]
        saved = losses[rows, here][:, None] - losses[rows]
        slope = np.divide(saved, extra, out=np.zeros(saved.shape), where=(extra > 0) & (saved > 0))
        steepest = slope.max(1, keepdims=True)
        there = np.where(slope == steepest, extra, -1).argmax(1)
        goes = np.flatnonzero(steepest[:, 0] > 0)
        rows, here, there = rows[goes], here[goes], there[goes]
        # Rounding must not let an item's second step come before its first.
        reached = np.minimum(steepest[goes, 0], reached[goes])
        found.append((rows, there, reached, extra[goes, there]))
        here = there
    columns = [np.concatenate(parts) for parts in zip(*found, strict=True)]
    order = np.argsort(-columns[2], kind="stable")  # of equals the one found first
    return cheapest, tuple(column[order] for column in columns)


@dataclass(eq=False)
class _Core:
    """What the dynamic program works on: alternatives of the items that have any.

    `item`, `option`, `extra` (cost) and `regret` [alternatives], an item's side by side; item
    number j of the core owns start[j]:start[j + 1].
    """

    item: Integers
    option: Integers
    extra: Integers
    regret: Floats
    start: Integers


def _core(items: Items, relaxed: Relaxed, gap: float) -> _Core:
    """Alternatives whose regret is below `gap`, items of least regret first."""
    rows = np.arange(len(items))
    extra = items.costs - items.costs[rows, relaxed.choice][:, None]
    worse = items.losses - items.losses[rows, relaxed.choice][:, None]
    regret = np.maximum(worse + relaxed.price * extra, 0.0)
    item, option = np.nonzero((regret < gap) & (extra != 0))
    regret, extra = regret[item, option], extra[item, option]
    least = np.full(len(items), np.inf)
    np.minimum.at(least, item, regret)
    order = np.lexsort((item, least[item]))
    item, option, extra, regret = item[order], option[order], extra[order], regret[order]
    first = np.flatnonzero(np.diff(item, prepend=-1))
    return _Core(item, option, extra, regret, np.append(first, len(item)))


def _undominated(cost: Integers, loss: Floats) -> Integers:
    """Indices, by rising cost, of states than which no cheaper or equal one has less loss."""
    order = np.argsort(cost, kind="stable")
    loss = loss[order]
    before = np.minimum.accumulate(np.concatenate([[np.inf], loss[:-1]]))
    order = order[loss < before]
    return order[np.append(np.diff(cost[order]) > 0, True)]  # of one cost, the last is the least


def optimum(relaxation: Relaxation, budget: int) -> tuple[Integers, float, bool]:
    """The choice of least loss within `budget`, a lower bound of it, and whether it is proven.

    Proven means that no choice has less loss than it by a share of TOLERANCE, of its own loss
    (where losses are below 0: of what it loses above the least that is below 0, item by item).
    The budget must be at least that of the cheapest plan.
    """
    items = relaxation.items
    rows, number = np.arange(len(items)), np.arange(items.costs.shape[1])
    option: Integers = np.broadcast_to(number, items.costs.shape)
    while True:
        above = items.losses - np.minimum(items.losses.min(1, keepdims=True), 0.0)
        relaxed = relaxation.at(budget)
        choice, proven = relaxed.choice, False
        useless = above > VAST * _sum(above, choice)
        if not useless.any():
            choice, proven = _improved(items, relaxed, TOLERANCE * _sum(above, choice))
            useless = above > VAST * _sum(above, choice)
        if not useless.any():
            return option[rows, choice], relaxed.bound, proven
        # In the place of a useless option the item repeats that of the plan.
        kept = np.where(useless, choice[:, None], number)
        option = np.take_along_axis(option, kept, 1)
        costs, losses = items.costs, items.losses
        items = Items(np.take_along_axis(costs, kept, 1), np.take_along_axis(losses, kept, 1))
        relaxation = Relaxation(items)


def _sum(table: Floats, choice: Integers) -> float:
    return math.fsum(table[np.arange(len(table)), choice].tolist())


def _improved(items: Items, relaxed: Relaxed, tolerance: float) -> tuple[Integers, bool]:
    """The choice that is better than the relaxation's by more than `tolerance`, or that one.

    Also whether no choice is better still.
    """
    left = relaxed.budget - relaxed.cost
    gap = relaxed.price * left - tolerance
    core = _core(items, relaxed, gap)
    taken, proven = _search(core, left, relaxed.price, gap, NEGLIGIBLE * abs(relaxed.bound))
    choice = relaxed.choice.copy()
    choice[core.item[taken]] = core.option[taken]
    return choice, proven


def _search(
    core: _Core, left: int, price: float, gap: float, enough: float
) -> tuple[list[int], bool]:
    """The alternatives whose regrets + price * (left - extras) are least, if below `gap`.

    Also whether nothing less exists. With many states, what is below `enough` will do.
    """
    first = core.start[:-1]
    least = np.minimum.reduceat(core.regret, first) if len(first) else np.zeros(0)
    freed = np.minimum(np.minimum.reduceat(core.extra, first), 0) if len(first) else first
    can_free = np.cumsum(freed[::-1])[::-1]  # by this item and those after it
    costs, regrets = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[int, Any]] = []  # number of states before; of each state its origin
    best, at, untried, effort = gap, (0, 0), math.inf, 0
    for j in range(len(first)):
        # A state that ends here has been counted: one that goes on adds this regret at least.
        live = np.flatnonzero((regrets + least[j] < best) & (costs + can_free[j] <= left))
        most = STATES if effort < EFFORT else 0
        if len(live) > most:
            most = most if best > enough else 0
            rank = live[np.argsort(regrets[live], kind="stable")]
            untried = min(untried, float(regrets[rank[most]] + least[j]))
            live = np.sort(rank[:most])
        if not len(live):
            break
        mine = slice(core.start[j], core.start[j + 1])
        extra = np.append(0, core.extra[mine])[:, None]
        regret = np.append(0.0, core.regret[mine])[:, None]
        before, width = len(costs), len(live)
        costs, regrets = (costs[live] + extra).ravel(), (regrets[live] + regret).ravel()
        kept = _undominated(costs, regrets - price * costs)
        costs, regrets = costs[kept], regrets[kept]
        trail.append((before, (kept // width * before + live[kept % width]).astype(np.int32)))
        effort += len(kept)
        ends = np.where(costs <= left, regrets + price * (left - costs), np.inf)
        if ends.min() < best:
            best, at = float(ends.min()), (j + 1, int(ends.argmin()))
    return _trace(core, trail, *at), best <= untried


def _trace(core: _Core, trail: list[tuple[int, Any]], step: int, state: int) -> list[int]:
    """Alternatives that led to a state after `step` items."""
    taken = []
    while step:
        step -= 1
        before, origin = trail[step]
        alternative, state = divmod(int(origin[state]), before)
        if alternative:
            taken.append(int(core.start[step]) + alternative - 1)
    return taken
