"""Small knapsacks of any kind, and their best plan, found by trying all."""

from __future__ import annotations

import itertools
import math
import random

from mixbits.planning.allocate import Item, total


def random_items(rng: random.Random) -> list[Item]:
    """Up to 6 items with up to 4 options: ties, zero losses, single options, odd divisors."""
    items = []
    small = rng.random() < 0.5  # few distinct values: many ties
    for index in range(rng.randint(1, 6)):
        options = rng.choice([1, 2, 2, 3, 4])
        costs = [rng.randint(1, 5) if small else rng.randint(1, 10**6) for _ in range(options)]
        losses = [
            rng.choice([0.0, 1.0, 2.0, 3.0]) if small else rng.random() * 10 ** rng.randint(-6, 3)
            for _ in range(options)
        ]
        if rng.random() < 0.2:
            losses = [0.0] * options
        items.append(Item(f"item {index}", tuple(costs), tuple(losses)))
    return items


def brute_force(items: list[Item], budget: int) -> float:
    """Least loss of all plans within the budget."""
    plans = itertools.product(*(range(len(i.costs)) for i in items))
    return min(loss for cost, loss in (total(items, p) for p in plans) if cost <= budget)


def close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-8, abs_tol=1e-12)
