"""Spend a bit budget where it hurts most: the exact plan, and the baselines.

Every unit (one linear, several that must agree, or a slab of their columns) takes exactly one of
its options; an option has a cost in bits and a predicted loss. We minimise the summed loss under
a budget on the summed cost: `knapsack` says how.

The result is optimal up to a relative 1e-9 of the loss, or says that this is not `proven`; either
way it comes with its gap to the lower bound of the linear relaxation. Pure: no torch, no files,
the same answer on every run.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError
from .knapsack import Items, Relaxation, optimum


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
        if not all(map(math.isfinite, self.losses)):
            raise ValueError(f"losses must be finite: got {self.losses} ({self.name})")


def as_items(items: Sequence[Item] | Items) -> Items:
    """Items as arrays [items, options]; those with fewer options repeat their last one."""
    if isinstance(items, Items):
        return items
    most = max((len(item.costs) for item in items), default=1)
    costs = [item.costs + item.costs[-1:] * (most - len(item.costs)) for item in items]
    losses = [item.losses + item.losses[-1:] * (most - len(item.losses)) for item in items]
    shape = len(items), most
    return Items(
        np.array(costs, np.int64).reshape(shape), np.array(losses, np.float64).reshape(shape)
    )


@dataclass(frozen=True)
class Allocation:
    """`choice[i]` is the option taken for item i; `lower_bound` is that of the relaxation.

    `proven`: no plan within the budget has less loss, up to a relative 1e-9.
    """

    choice: tuple[int, ...]
    cost: int
    loss: float
    lower_bound: float
    proven: bool = False

    @property
    def gap(self) -> float:
        """Loss above the lower bound, as a share of the loss."""
        return (self.loss - self.lower_bound) / self.loss if self.loss > 0 else 0.0


class BudgetError(UsageError):
    """The budget is below the cheapest plan (`lowest`) in bits; `highest` is the dearest one."""

    def __init__(self, budget: int, lowest: int, highest: int) -> None:
        super().__init__(
            f"the budget must be at least {lowest} bits: got {budget} "
            f"(the dearest plan takes {highest})"
        )
        self.budget, self.lowest, self.highest = budget, lowest, highest


def total(items: Sequence[Item] | Items, choice: Sequence[int]) -> tuple[int, float]:
    """Summed cost (bits) and loss of a choice."""
    return as_items(items).total(choice)


def cost_range(items: Sequence[Item] | Items) -> tuple[int, int]:
    """Cost in bits of the cheapest and of the dearest plan."""
    return as_items(items).cost_range()


def _check_budget(items: Items, budget: int) -> None:
    lowest, highest = items.cost_range()
    if budget < lowest:
        raise BudgetError(budget, lowest, highest)


def optimal(relaxation: Relaxation, budget: int) -> Allocation:
    """The plan of least loss whose cost is at most `budget` bits. Raises BudgetError.

    One relaxation serves any number of budgets.
    """
    _check_budget(relaxation.items, budget)
    choice, bound, proven = optimum(relaxation, budget)
    return _allocation(relaxation.items, choice.tolist(), bound, proven)


def _allocation(
    items: Items, choice: Sequence[int], bound: float, proven: bool = False
) -> Allocation:
    cost, loss = items.total(choice)
    # Rounding can lift the bound of a plan that meets it above the plan's own loss.
    return Allocation(tuple(choice), cost, loss, min(bound, loss), proven)


def _one_option(items: Items, budget: int, seed: int) -> list[int]:
    """Every unit takes the same option: the dearest one that fits."""
    costs = items.costs.sum(0)  # fixed units repeat their only option; the others vary together
    if costs.min() > budget:  # though a mixed plan would fit
        raise BudgetError(budget, int(costs.min()), int(costs.max()))
    return [int(np.where(costs <= budget, costs, -1).argmax())] * len(items)


def _upgrade(items: Items, budget: int, order: Sequence[int]) -> list[int]:
    """All units at their cheapest option; then, in order, each that fits at its dearest."""
    cheapest, dearest = items.costs.argmin(1), items.costs.argmax(1)
    choice, best = cheapest.tolist(), dearest.tolist()
    extra = (items.costs.max(1) - items.costs.min(1)).tolist()
    left = budget - items.cost_range()[0]
    for i in order:
        if extra[i] <= left:
            choice[i], left = best[i], left - extra[i]
    return choice


def _head(items: Items, budget: int, seed: int) -> list[int]:
    return _upgrade(items, budget, range(len(items) - 1, -1, -1))


def _tail(items: Items, budget: int, seed: int) -> list[int]:
    return _upgrade(items, budget, range(len(items)))


def _random(items: Items, budget: int, seed: int) -> list[int]:
    return _upgrade(items, budget, random.Random(seed).sample(range(len(items)), len(items)))


_BASELINES: dict[str, Callable[[Items, int, int], list[int]]] = {
    "uniform": _one_option,
    "head": _head,
    "tail": _tail,
    "random": _random,
}
STRATEGIES = ("optimal", *_BASELINES)


def allocate(
    items: Sequence[Item] | Items, budget: int, strategy: str = "optimal", seed: int = 0
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
    if not len(items):
        return Allocation((), 0, 0.0, 0.0, proven=True)
    table = as_items(items)
    relaxation = Relaxation(table)
    if strategy == "optimal":
        return optimal(relaxation, budget)
    _check_budget(table, budget)
    choice = _BASELINES[strategy](table, budget, seed)
    if not isinstance(items, Items):  # a repeated last option is the last one
        choice = [min(c, len(i.costs) - 1) for c, i in zip(choice, items, strict=True)]
    return _allocation(table, choice, relaxation.at(budget).bound)
