"""Rank correlation, the next swaps, and the stability of a plan, against slow twins."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from knapsacks import random_items

from mixbits.planning.allocate import Item, allocate, cost_range, total
from mixbits.planning.stability import next_swaps, spearman, stability


def test_rank_correlation_of_known_data() -> None:
    # Spearman's own kind of example: d^2 sums to 194 over 10 pairs, 1 - 6 * 194 / 990.
    iq = [106, 86, 100, 101, 99, 103, 97, 113, 112, 110]
    hours = [7, 0, 27, 50, 28, 29, 20, 12, 6, 17]
    assert spearman(iq, hours) == pytest.approx(1 - 6 * 194 / 990)
    assert spearman([1, 2, 3], [10, 100, 1e9]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # Equal values share ranks 1.5, 1.5, 3 and 1, 2.5, 2.5.
    assert spearman([1, 1, 2], [0, 5, 5]) == pytest.approx(0.5)


def test_rank_correlation_of_nothing_is_no_number() -> None:
    for a, b in [([], []), ([1], [2]), ([1, 1, 1], [1, 2, 3])]:
        assert math.isnan(spearman(a, b))
    with pytest.raises(ValueError, match="got 2 and 3 values"):
        spearman([1, 2], [1, 2, 3])


def slow_swaps(items: list[Item], choice: tuple[int, ...], sign: int) -> list[float]:
    """Best loss saved per bit bought (sign 1), or least added per bit freed (-1), per item."""
    found = []
    for item, now in zip(items, choice, strict=True):
        rates = [
            (item.losses[now] - item.losses[o]) / (item.costs[o] - item.costs[now])
            for o in range(len(item.costs))
            if sign * (item.costs[o] - item.costs[now]) > 0
        ]
        found += [max(rates) if sign > 0 else min(rates)] if rates else []
    return sorted(found, reverse=sign > 0)


@pytest.mark.parametrize("dearer", [True, False])
def test_next_swaps_are_the_best_ones(dearer: bool) -> None:
    sign = 1 if dearer else -1
    for seed in range(100):
        rng = random.Random(seed)
        items = random_items(rng)
        choice = allocate(items, rng.randint(*cost_range(items))).choice
        swaps = next_swaps(items, choice, dearer, count=3)
        assert [s.per_bit for s in swaps] == slow_swaps(items, choice, sign)[:3]
        for swap in swaps:
            changed = list(choice)
            assert changed[swap.item] == swap.before
            changed[swap.item] = swap.after
            (cost, loss), (old_cost, old_loss) = total(items, changed), total(items, choice)
            assert cost - old_cost == swap.bits
            assert sign * swap.bits > 0
            assert loss - old_loss == pytest.approx(swap.loss, rel=1e-9, abs=1e-9)


def test_the_best_slab_stands_for_its_unit() -> None:
    items = [Item(str(i), (4, 8), (float(i), 0.0)) for i in range(6)]
    found = next_swaps(items, [0] * 6, dearer=True, units=["q", "q", "q", "o", "o", "down"])
    assert [s.item for s in found] == [5, 4, 2]
    assert next_swaps(items, [0] * 6, dearer=False) == []
    assert next_swaps([], [], dearer=True) == []


def test_stability_counts_what_agrees() -> None:
    costs = ((4, 8), (4, 8), (8, 16))
    full, first, second = (
        [Item(str(i), c, (x, 0.0)) for i, (c, x) in enumerate(zip(costs, losses, strict=True))]
        for losses in ((5.0, 3.0, 1.0), (5.0, 2.0, 0.0), (4.0, 6.0, 0.0))
    )
    # One upgrade of 4 bits: the halves disagree on which of the first two takes it.
    found = stability(full, [first, second], 20)
    assert found["same_units"] == pytest.approx(1 / 3)
    assert found["same_bits"] == pytest.approx(8 / 20)
    assert found["excess_loss"] == pytest.approx([0, 6 / 4 - 1])
    same = stability(full, [full, full], 20)
    assert same == {"same_units": 1.0, "same_bits": 1.0, "excess_loss": [0.0, 0.0]}
    assert np.isfinite(
        stability([Item("a", (4,), (0.0,))], [[Item("a", (4,), (0.0,))]] * 2, 4)["excess_loss"]
    ).all()
