"""Refine a plan by what its changes really cost: `--refine`.

Scores are of the second order at the original model, one linear at a time. Where rounding takes a
model far from the original (2-bit weights), or where errors of several linears meet, a plan that is
optimal for its scores can be improved. So a round measures, at the plan as it stands, the KL
divergence on calibration text with every single unit in each of its other schemes. What such a
flip adds is its *marginal*: it holds the interactions with all that the plan rounds already. With
marginals in the place of losses the knapsack is solved again, as in sequential linear programming
(Griffith and Stewart, Management Science 7(4), 1961). But marginals hold near the plan only, where
few units have changed. So plans near and far are proposed: beside its marginal, a change of a unit
has a price, from nothing (the knapsack's plan, however far) to so much that hardly a unit moves.
This is local branching (Fischetti and Lodi, Mathematical Programming 98, 2003) with a price in the
place of its limit on changes. And for every unit that the knapsack's plan changes, the best plan
that leaves it is proposed, as on the way to the second-best solution (Lawler, Management Science
18(7), 1972). All proposals are measured, on other sequences than the marginals that led to them, or
the luckiest would look best. The best becomes the plan if it is better there than the one before,
and the next round begins; otherwise the plan is final.

What is measured is what the scores predict: weights rounded to nearest, activations rounded. A flip
leaves the blocks before it alone, so their outputs at the plan are kept for the batch that runs,
which saves half the time. Weights are rounded each time that they are used: next to multiplying
thousands of tokens it costs little time, and no memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..formats.schemes import Assignment, Recipe
from ..measuring.evaluate import logits_kl
from ..model.layout import LinearInfo
from ..model.probing import probed
from ..model.streaming import StreamedModel
from ..planning.allocate import Allocation, Item, total
from ..planning.plan import Budget, Problem
from ..progress import steps
from ..rounding.nearest import fake_weight
from ..rounding.whole_model import rounded_linear
from .settings import BATCH_SIZE

SEQUENCES = 32  # for marginals, and as many others for proposals: more order units alike
HALVINGS = 8  # of the price of a change, from the largest marginal down

Picks = tuple[int, ...]  # the number of the option of each item of a problem: a plan
Measure = Callable[[Sequence[Picks]], list[float]]  # KL of plans, most alike to the first
Solve = Callable[[Sequence[Item]], Picks]  # the knapsack, within the budget


# --- Measuring --------------------------------------------------------------------------------


def _logits(
    model: StreamedModel,
    linears: Sequence[LinearInfo],
    recipes: Mapping[str, Recipe],
    ids: Tensor,
    kept: list[Any],
    first: int,
) -> Tensor:
    """Logits [B, S, V]; blocks before `first` answer what is `kept`, others are kept if not yet."""

    def probe(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if name not in recipes:  # an expert that is left alone
            return torch.nn.functional.linear(x, weight, bias)
        return rounded_linear(x, fake_weight(weight, recipes[name]), recipes[name], bias)

    def block(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if index < first:
            return kept[index]
        out = model.run_block(index, hidden, *args, **kwargs)
        if index == len(kept):
            kept.append(out)
        return out

    with probed(model.model, linears, probe):
        return model.run(ids, block)


def divergences(
    model: StreamedModel,
    linears: Sequence[LinearInfo],
    recipes: Assignment,
    changes: Sequence[Assignment],
    ids: Tensor,
    *,
    batch_size: int,
    judged_from: int = 0,
) -> Tensor:
    """float64 [1 + changes, sequences]: mean KL(original || quantized) per token, in nats.

    Of `recipes` for the linears, rounded to nearest, and of these with each of `changes` (recipes
    of some linears) instead, which run from their first linear's block on. ids [sequences, length],
    of which positions before `judged_from` are not counted.
    """
    blocks = {i.name: len(model.blocks) if i.block is None else i.block for i in linears}
    variants: list[tuple[Assignment, int]] = [({}, 0)]
    variants += [(c, min(map(blocks.__getitem__, c), default=len(model.blocks))) for c in changes]
    batches, columns = ids.split(batch_size), []
    advance = steps(len(ids) * len(variants), len(model.blocks))
    for batch in batches:
        kept: list[Any] = []
        reference, kls = model.logits(batch), []
        for change, first in variants:
            logits = _logits(model, linears, {**recipes, **change}, batch, kept, first)
            kls.append(logits_kl(reference, logits, batch, judged_from))
            advance(len(batch))
        columns.append(torch.stack(kls))
    return torch.cat(columns, 1)


@dataclass(frozen=True)
class Meter:
    """A `Measure` of a problem's plans on ids [sequences, length]."""

    model: StreamedModel
    problem: Problem
    ids: Tensor
    batch_size: int = BATCH_SIZE
    judged_from: int = 0

    @cached_property
    def _recipes(self) -> list[Assignment]:
        """All units in their first option, in their second, ..., or in their last."""
        counts = [len(item.costs) for item in self.problem.items]
        plans = [tuple(min(o, n - 1) for n in counts) for o in range(max(counts))]
        allocations = [Allocation(plan, 0, 0.0, 0.0) for plan in plans]
        return [self.problem.plan(a, "", Budget()).assignment for a in allocations]

    def _changes(self, plan: Picks, at: Picks | None = None) -> Assignment:
        """Recipes of the units for which two plans differ; without `at` of all units."""
        return {
            info.name: self._recipes[option][info.name]
            for i, (entry, option) in enumerate(zip(self.problem.units, plan, strict=True))
            if at is None or option != at[i]
            for info in entry.unit.linears
        }

    def __call__(self, plans: Sequence[Picks]) -> list[float]:
        linears = self.problem.linears
        changes = [self._changes(plan, plans[0]) for plan in plans[1:]]
        recipes = self._changes(plans[0])
        kls = divergences(
            self.model,
            linears,
            recipes,
            changes,
            self.ids,
            batch_size=self.batch_size,
            judged_from=self.judged_from,
        )
        return [float(kl) for kl in kls.mean(1)]


def two_meters(whole: Meter) -> tuple[Meter, Meter]:
    """The same on the first and on the last of its sequences, SEQUENCES at most of each."""
    count = min(SEQUENCES, (len(whole.ids) + 1) // 2)  # a single sequence has to do for both
    return replace(whole, ids=whole.ids[:count]), replace(whole, ids=whole.ids[-count:])


# --- Deciding ---------------------------------------------------------------------------------


def marginals(items: Sequence[Item], at: Picks, measure: Measure) -> list[Item]:
    """Items whose losses are what single changes of a plan add to its KL.

    Where no change of an item adds anything, as of an expert that no token reached, its losses are
    those predicted, in the measure of the others. Raises UsageError where a KL is not finite.
    """
    flips = [(i, o) for i, item in enumerate(items) for o in range(len(item.costs)) if o != at[i]]
    kl, *kls = measure([at, *((*at[:i], o, *at[i + 1 :]) for i, o in flips)])
    names = ["the plan as it stands", *(items[i].name for i, _ in flips)]
    for name, value in zip(names, [kl, *kls], strict=True):
        if not math.isfinite(value):
            raise UsageError(f"the KL must be finite to refine a plan: got {value} ({name})")
    added = dict(zip(flips, (flipped - kl for flipped in kls), strict=True))
    measured = [
        tuple(added.get((i, o), 0.0) for o in range(len(item.costs)))
        for i, item in enumerate(items)
    ]
    predicted = [
        tuple(x - item.losses[o] for x in item.losses) for item, o in zip(items, at, strict=True)
    ]
    pairs = [(m, p) for m, p in zip(measured, predicted, strict=True) if any(m)]
    sums = [sum(abs(x) for losses in column for x in losses) for column in zip(*pairs, strict=True)]
    share = sums[0] / sums[1] if sums and sums[1] else 1.0
    return [
        Item(item.name, item.costs, m if any(m) else tuple(share * x for x in p))
        for item, m, p in zip(items, measured, predicted, strict=True)
    ]


def _priced(item: Item, now: int, price: float) -> Item:
    losses = [loss + price * (option != now) for option, loss in enumerate(item.losses)]
    # The knapsack's tolerance is a share of the summed loss: none may be below 0.
    return Item(item.name, item.costs, tuple(loss - min(losses) for loss in losses))


def proposals(items: Sequence[Item], at: Picks, solve: Solve) -> list[Picks]:
    """Other plans near and far, from the marginals at one: each once, the farthest first."""

    def solved(prices: Sequence[float]) -> Picks:
        return solve([_priced(*entry) for entry in zip(items, at, prices, strict=True)])

    largest = max(abs(loss) for item in items for loss in item.losses)
    far = solved([0.0] * len(items))
    moved = [i for i, (a, b) in enumerate(zip(at, far, strict=True)) if a != b]
    never = 2 * largest * len(items)
    without = [solved([never * (i == held) for i in range(len(items))]) for held in moved]
    near = [solved([largest / 2**n] * len(items)) for n in reversed(range(HALVINGS))]
    found = dict.fromkeys([far, *without, *near])
    found.pop(at, None)
    return list(found)


@dataclass(frozen=True)
class Refined:
    """The best plan that was measured, and a row for each round.

    A row has `kl_before` and `kl` (of the best proposal) as judged, nats per token, `predicted_kl`
    (of the same, by marginals), `changed` (units) and `proposals` (plans that were measured).
    """

    plan: Picks
    rounds: list[dict[str, Any]]


def refine(
    items: Sequence[Item],
    start: Picks,
    flips: Measure,
    judge: Measure,
    solve: Solve,
    rounds: int,
) -> Refined:
    """Improve a plan of `items` for so many rounds at most, or until nothing better is proposed.

    `flips` measures for marginals, `judge` the proposals, on other text.
    """
    plan, rows = start, []
    for _ in range(rounds):
        changes = marginals(items, plan, flips)
        proposed = proposals(changes, plan, solve)
        if not proposed:
            break
        before, *kls = judge([plan, *proposed])
        after = min(kls)
        best = proposed[kls.index(after)]
        row = {"kl_before": before, "kl": after, "predicted_kl": before + total(changes, best)[1]}
        changed = sum(a != b for a, b in zip(plan, best, strict=True))
        rows.append({**row, "changed": changed, "proposals": len(proposed)})
        if not after < before:
            break
        plan = best
    return Refined(plan, rows)
