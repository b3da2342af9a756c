"""The knapsack is exact: brute force says so, on instances small enough to try every plan."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from knapsacks import brute_force, close, random_items

from mixbits.errors import UsageError
from mixbits.planning.allocate import STRATEGIES, BudgetError, Item, allocate, cost_range, total


@pytest.mark.parametrize("seed", range(0, 400, 100))
def test_optimal_equals_brute_force(seed: int) -> None:
    cases = []
    for instance in range(seed, seed + 100):
        rng = random.Random(instance)
        items = random_items(rng)
        lowest, highest = cost_range(items)
        between = [rng.randint(lowest, highest) for _ in range(2)]
        cases += [(items, budget) for budget in (lowest, *between, highest)]
    for items, budget in cases:
        found = allocate(items, budget)
        best = brute_force(items, budget)
        assert found.cost <= budget
        assert (found.cost, found.loss) == total(items, found.choice)
        assert close(found.loss, best), (items, budget)
        assert found.lower_bound <= best or close(found.lower_bound, best)


def test_optimal_loss_never_grows_with_the_budget() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        items = random_items(rng)
        lowest, highest = cost_range(items)
        step = max(1, (highest - lowest) // 40)
        losses = [allocate(items, b).loss for b in range(lowest, highest + step, step)]
        assert all(after <= before for before, after in itertools.pairwise(losses))


def test_a_model_of_a_hundred_layers_is_solved_and_its_gap_is_known() -> None:
    rng = random.Random(1)
    items = []
    for index in range(224):
        size = rng.choice([4096 * 4096, 4096 * 1024, 4096 * 14336]) + rng.randint(0, 1)
        losses = sorted((rng.random() * 10 ** rng.randint(-3, 0) for _ in range(6)), reverse=True)
        items.append(Item(str(index), tuple(size * b for b in (2, 3, 4, 5, 8, 16)), tuple(losses)))
    lowest, highest = cost_range(items)
    found = allocate(items, (2 * lowest + highest) // 3)
    assert found.lower_bound <= found.loss
    assert 0 <= found.gap < 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_keeps_the_budget_and_repeats_itself(strategy: str) -> None:
    for seed in range(60):
        rng = random.Random(seed)
        items = random_items(rng)
        budget = rng.randint(*cost_range(items))
        try:
            found = allocate(items, budget, strategy, seed)
        except BudgetError as error:
            assert strategy == "uniform"  # no common option fits though a mixed plan would
            assert error.lowest > budget
            continue
        assert found.cost <= budget
        assert (found.cost, found.loss) == total(items, found.choice)
        assert found == allocate(items, budget, strategy, seed)
        assert found.loss >= allocate(items, budget).loss - 1e-9 * abs(found.loss)


# Five units of 10 weights: 4 bits each, or 8.
FIVE = [
    Item(name, (40, 80), (float(loss), 0.0)) for name, loss in zip("abcde", range(5), strict=True)
]


@pytest.mark.parametrize(
    ("strategy", "budget", "expected"),
    [
        ("uniform", 200, (0, 0, 0, 0, 0)),
        ("uniform", 399, (0, 0, 0, 0, 0)),
        ("uniform", 400, (1, 1, 1, 1, 1)),
        ("head", 280, (0, 0, 0, 1, 1)),
        ("tail", 280, (1, 1, 0, 0, 0)),
        ("tail", 279, (1, 0, 0, 0, 0)),
        ("optimal", 280, (0, 0, 0, 1, 1)),
    ],
)
def test_baselines_are_what_they_are_called(
    strategy: str, budget: int, expected: tuple[int, ...]
) -> None:
    assert allocate(FIVE, budget, strategy).choice == expected


def test_random_is_drawn_with_the_seed() -> None:
    drawn = {allocate(FIVE, 280, "random", seed).choice for seed in range(50)}
    assert drawn == {
        tuple(int(i in pair) for i in range(5)) for pair in itertools.combinations(range(5), 2)
    }


def test_uniform_lets_a_fixed_unit_be() -> None:
    items = [*FIVE, Item("fixed", (160,), (9.0,))]
    assert allocate(items, 560, "uniform").choice == (1, 1, 1, 1, 1, 0)
    assert allocate(items, 559, "uniform").choice == (0, 0, 0, 0, 0, 0)


def test_uniform_says_what_it_needs_where_only_a_mixed_plan_fits() -> None:
    items = [Item("a", (3, 5), (1.0, 0.0)), Item("b", (5, 3), (1.0, 0.0))]
    assert allocate(items, 6).cost == 6
    with pytest.raises(BudgetError) as caught:
        allocate(items, 6, "uniform")
    assert caught.value.lowest == 8


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_budget_below_the_cheapest_plan(strategy: str) -> None:
    with pytest.raises(BudgetError, match="at least 200 bits: got 199") as caught:
        allocate(FIVE, 199, strategy)
    assert (caught.value.lowest, caught.value.highest) == (200, 400)
    assert isinstance(caught.value, UsageError)


def test_other_errors() -> None:
    with pytest.raises(UsageError, match=r"strategy must be one of optimal.*got 'best'"):
        allocate(FIVE, 400, "best")
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"losses must be finite.*\(q_proj\)"):
            Item("q_proj", (1, 2), (0.0, bad))
    with pytest.raises(ValueError, match="as many costs as losses"):
        Item("q_proj", (1,), (0.0, 1.0))
    with pytest.raises(ValueError, match="at least one"):
        Item("q_proj", (), ())


def test_nothing_to_allocate() -> None:
    assert allocate([], 0).choice == ()
