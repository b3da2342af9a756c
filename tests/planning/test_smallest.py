"""The smallest model of a quality: found in few measurements, and never one that misses it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from mixbits.errors import UsageError
from mixbits.planning.allocate import Item
from mixbits.planning.curve import Point, frontier
from mixbits.planning.smallest import smallest


def model(seed: int, layers: int = 60) -> list[Point]:
    """The frontier of a model whose linears take 4 or 8 bits."""
    rng = random.Random(seed)
    items = []
    for i in range(layers):
        size = rng.choice([1 << 10, 3 << 10])
        loss = size * math.exp(rng.gauss(0, 1.5)) / 1e5
        items.append(Item(str(i), (4 * size, 8 * size), (loss, loss / 200)))
    return frontier(items)


def measured(points: list[Point], scale: float, power: float, noise: float, seed: int):
    """A KL that is scale * predicted^power, with noise that depends on the budget only."""
    calls: list[int] = []
    budgets = [p.budget for p in points]
    losses = [p.allocation.loss for p in points]

    def kl(budget: int) -> float:
        calls.append(budget)
        loss = np.interp(budget, budgets, losses)
        jitter = random.Random(f"{seed} {budget}").uniform(1 - noise, 1 + noise)
        return scale * loss**power * jitter

    return kl, calls


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5])
@pytest.mark.parametrize(("scale", "power"), [(1, 1), (3, 0.7), (0.2, 1.6)])
def test_what_is_found_meets_the_limit_and_a_little_less_misses_it(
    scale: float, power: float, noise: float
) -> None:
    for seed in range(20):
        points = model(seed)
        kl, calls = measured(points, scale, power, noise, seed)
        limits = [kl(points[-1].budget), kl(points[0].budget)]
        limit = math.exp(sum(map(math.log, limits)) / 2)
        elements = points[-1].budget / 8
        tolerance = round(0.05 * elements)
        calls.clear()
        found = smallest(points, kl, limit, tolerance, most=20)
        assert found.kl == found.measured[found.budget] <= limit
        assert found.too_small is not None and found.measured[found.too_small] > limit
        assert 0 < found.budget - found.too_small <= tolerance
        assert calls == list(found.measured)  # none is measured twice
        assert found.budget == min(b for b, x in found.measured.items() if x <= limit)


def test_a_good_prediction_needs_few_measurements() -> None:
    counts = []
    for seed in range(40):
        points = model(seed)
        kl, calls = measured(points, 2.5, 0.9, 0.03, seed)
        limit = (kl(points[0].budget) * kl(points[-1].budget)) ** 0.5
        calls.clear()
        smallest(points, kl, limit, tolerance=round(0.02 * points[-1].budget / 8))
        counts.append(len(calls))
    assert sorted(counts)[20] <= 5
    assert max(counts) <= 8  # a bisection of 4 bits to 0.02 takes 8, and the ends


def test_the_ends() -> None:
    points = model(0)
    first, last = points[0].budget, points[-1].budget
    kl, calls = measured(points, 1, 1, 0, 0)
    found = smallest(points, kl, kl(first) * 2, 100)
    assert (found.budget, found.too_small) == (first, None)
    found = smallest(points, kl, kl(last), 100)
    assert found.kl <= kl(last)
    calls.clear()
    with pytest.raises(UsageError, match=r"--max-kl 1e-09 is out of reach.*KL of 0\.\d+") as caught:
        smallest(points, kl, 1e-9, 100)
    assert f"{kl(last):.4g}" in str(caught.value)
    assert calls[0] == last  # which is asked first, since the prediction already misses


def test_few_measurements_still_give_a_plan_that_meets_the_limit() -> None:
    points = model(1)
    kl, calls = measured(points, 100, 1, 0, 1)  # the prediction is far too good
    limit = kl(points[-1].budget) * 1.01
    for most in range(1, 6):
        calls.clear()
        found = smallest(points, kl, limit, 1, most=most)
        assert found.kl <= limit
        assert len(calls) <= most + 1


def test_one_point_is_a_curve() -> None:
    point = frontier([Item("a", (4,), (1.0,))])
    assert smallest(point, lambda budget: 0.5, 1.0, 1).budget == 4
    with pytest.raises(UsageError, match="out of reach"):
        smallest(point, lambda budget: 2.0, 1.0, 1)


def test_a_model_that_loses_nothing_or_gives_no_number() -> None:
    points = frontier([Item("a", (4, 8), (1.0, 0.0)), Item("b", (4, 8), (2.0, 0.0))])
    exact: Callable[[int], float] = lambda budget: 0.0 if budget == 16 else 1.0  # noqa: E731
    assert smallest(points, exact, 0.5, 1).budget == 16
    assert smallest(points, lambda budget: 0.0, 0.5, 1).budget == 8
    with pytest.raises(UsageError, match="KL must be finite: got nan"):
        smallest(points, lambda budget: math.nan, 0.5, 1)


def test_bad_limits() -> None:
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(UsageError, match="must be above 0"):
            smallest(model(0), lambda budget: 1.0, limit, 1)
    with pytest.raises(ValueError, match="at least 1 bit"):
        smallest(model(0), lambda budget: 1.0, 1.0, 0)
