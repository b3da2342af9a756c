"""plan.json: which unit gets which scheme, and what that costs.

    {"mixbits_plan": 1, "strategy", "budget", "weight_scale_mode", "act_scale_mode",
     "predicted_loss", "lower_bound", ...,
     "units": [{"unit": name, "scheme": "MXFP4", "linears": {name: "all", ...}}, ...]}

`folded` is there, and true, where the model is quantized in a rotated basis (`--rotate fold`).
The file may be edited: change a scheme and pass it back with `--plan`. A linear that no unit
names is left alone. "all" says that the unit's scheme covers all column slabs of the linear.

A unit whose columns take several schemes has slabs in the place of one scheme,

    {"unit": name, "slabs": {"MXFP8": "0-2,5", "MXFP4": "3-4,6-7"}, "linears": {...}}

runs of `slab_columns` columns (a key of the plan), counted in the unit's `order` of columns where
it has one. The order of a down_proj's columns is written into the rows of its gate and up
projections where that changes nothing, the others are stored. `rotated` lists the unit's linears
whose ordered columns are rotated.

Counting. A budget in average bits counts everything stored for the linears that could be
quantized: codes, scales and zero points, and 16 bits for a linear left alone. Without scale
bits it counts elements only, as the published tables do. A budget in bytes counts the whole
weight files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files.io import write_text
from ..formats.schemas import PlanFile, check
from ..formats.schemes import (
    LEFT_ALONE,
    MX_GROUP,
    ROW,
    Assignment,
    Recipe,
    Scheme,
    order_bits,
    parse_scheme,
)
from ..measuring.scores import VERSION, Scores, dump, read_json
from ..model.layout import LinearInfo
from ..model.units import Unit, match_units
from .allocate import Allocation, BudgetError, Item, allocate, cost_range, total


@dataclass(frozen=True)
class Budget:
    """`avg_bits` per weight, `size_bytes` for the weight files, or `total_bits` of the linears.

    The last is what a search for `max_kl` nats per token found.
    """

    avg_bits: float | None = None
    size_bytes: int | None = None
    ignore_scale_bits: bool = False
    total_bits: int | None = None
    max_kl: float | None = None

    def describe(self) -> dict[str, Any]:
        """`budget` of plan.json: what was asked for, and what counts."""
        if self.size_bytes is not None:
            return {"size_bytes": self.size_bytes}
        counted = "elements" if self.ignore_scale_bits else "elements, scales and zero points"
        if self.total_bits is not None:
            return {"max_kl": self.max_kl, "total_bits": self.total_bits, "counted": counted}
        return {"avg_bits": self.avg_bits, "counted": counted}


def average_bits(
    linears: Sequence[LinearInfo], assignment: Assignment, ignore_scale_bits: bool = False
) -> float:
    """Mean bits per weight over `linears`; those without a recipe count 16."""
    bits = sum(
        assignment.get(i.name, LEFT_ALONE).storage_bits(
            i.out_features, i.in_features, ignore_scale_bits
        )
        for i in linears
    )
    return bits / sum(info.numel for info in linears)


def unit_options(
    units: Sequence[Unit], schemes: Sequence[Scheme], keep: Sequence[tuple[str, Scheme]]
) -> list[list[Scheme]]:
    """The schemes that each unit may take; a kept unit has one. Later `keep` entries win."""
    options = [list(schemes) for _ in units]
    for pattern, scheme in keep:
        for index in match_units(units, pattern):
            options[index] = [scheme]
    return options


def slab_width(schemes: Sequence[Scheme]) -> int:
    """Columns of a slab that holds whole groups of every scheme.

    Raises UsageError for BF16, and for a scale that all columns share.
    """
    for scheme in schemes:
        if not scheme.packed or scheme.format.group_size == ROW:
            raise UsageError(f"slabs must be of packed groups of columns: got {scheme.name}")
    return max([MX_GROUP, *(scheme.format.group_size for scheme in schemes)])


def format_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as "0-2,5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], n]
        else:
            runs.append([n])
    return ",".join("-".join(map(str, run)) for run in runs)


def parse_ranges(ranges: str, count: int) -> list[int]:
    """The inverse of `format_ranges`, in ascending order, of numbers below `count`.

    Raises UsageError for anything else, and for more than `count` numbers in all.
    """
    found: list[int] = []
    for run in ranges.split(",") if ranges else []:
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", run.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last < count or len(found) + last - first >= count:
            raise UsageError(
                f"slabs must hold each of 0-{count - 1} once, in ranges as '0-2,5': got {run!r:.60}"
            )
        found += range(first, last + 1)
    return sorted(found)


def recipe_of_slabs(
    slabs: Sequence[tuple[Scheme, Sequence[int]]],
    width: int,
    columns: int,
    order: Sequence[int] | None,
    rotated: bool,
    order_in_producer: bool = False,
) -> Recipe:
    """The recipe of a linear with `columns`, from its schemes' slabs of `width` ordered columns.

    Raises UsageError unless every slab is there once.
    """
    count = -(-columns // width)
    if sorted(n for _, mine in slabs for n in mine) != list(range(count)):
        told = {scheme.name: format_ranges(mine) for scheme, mine in slabs}
        raise UsageError(f"slabs must hold each of 0-{count - 1} once: got {told!r:.160}")
    if order is not None and len(order) != columns:
        raise UsageError(f"an order must hold each of {columns} columns once: got {len(order)}")
    taken = [(scheme, sorted(mine)) for scheme, mine in slabs if mine]
    # A short slab ends its row, or the blocks after it would begin amid a group.
    taken.sort(key=lambda part: part[1][-1] == count - 1)
    base = range(columns) if order is None else order
    segments, places = [], []
    for scheme, mine in taken:
        columns_of = [c for n in mine for c in base[n * width : (n + 1) * width]]
        segments.append((scheme, len(columns_of)))
        places += columns_of
    natural = places == list(range(columns))
    if natural and not rotated and len(segments) == 1:
        return Recipe.plain(segments[0][0])
    if natural:
        return Recipe(tuple(segments), None, rotated)
    return Recipe(tuple(segments), tuple(places), rotated, order_in_producer)


def can_order_producer(info: LinearInfo, names: Container[str]) -> bool:
    """Whether linears, all of `names`, can make a linear's input in any order of its columns."""
    return bool(info.makers) and all(maker in names for maker in info.makers)


@dataclass(frozen=True)
class Plan:
    """The content of plan.json, and every linear that it names."""

    data: dict[str, Any]
    linears: dict[str, LinearInfo]

    @property
    def assignment(self) -> Assignment:
        """Linear -> recipe, in the plan's order."""
        return {
            name: recipe
            for unit in self.data["units"]
            for name, recipe in self._recipes(unit).items()
        }

    def _recipes(self, unit: dict[str, Any]) -> Assignment:
        modes = self.data["weight_scale_mode"], self.data["act_scale_mode"]
        recipes: dict[str, Recipe] = {}
        for name in unit["linears"]:
            columns, rotated = self.linears[name].in_features, name in unit.get("rotated", [])
            if "slabs" in unit:
                width = self.data["slab_columns"]
                count = -(-columns // width)
                entries = unit["slabs"].items()
                slabs = [
                    (parse_scheme(s, *modes), parse_ranges(text, count)) for s, text in entries
                ]
                recipes[name] = recipe_of_slabs(
                    slabs,
                    width,
                    columns,
                    unit.get("order"),
                    rotated,
                    order_in_producer=can_order_producer(self.linears[name], self.linears),
                )
            else:
                scheme = parse_scheme(unit["scheme"], *modes)
                recipes[name] = Recipe.whole(scheme, columns, rotated)
        return recipes

    @classmethod
    def read(cls, path: Path, linears: Sequence[LinearInfo]) -> Plan:
        """Raises UsageError for a linear that the model lacks, or one twice.

        And for what `schemas.PlanFile` says a plan cannot be.
        """
        data = read_json(path, "mixbits_plan")
        check(PlanFile, data, path)
        known, seen = {info.name: info for info in linears}, set()
        for unit in data["units"]:
            for name in unit["linears"]:
                if name not in known:
                    raise UsageError(f"the model has no linear {name} ({path})")
                if name in seen:
                    raise UsageError(f"two units of a plan share linear {name} ({path})")
                seen.add(name)
        plan = cls(data, {name: known[name] for name in seen})
        for unit in data["units"]:
            try:
                plan._recipes(unit)
            except UsageError as error:
                raise UsageError(f"{error} ({path}, unit {unit['unit']})") from error
        return plan

    def write(self, path: Path) -> None:
        write_text(path, dump(self.data))


def shown(bits: float) -> float:
    """Bits per weight, rounded up to what an error message shows."""
    return math.ceil(bits * 1e4) / 1e4


def out_of_range(name: str, low: float, high: float, got: float) -> UsageError:
    """What to say of bits per weight, given as `name`, that are not between `low` and `high`."""
    return UsageError(
        f"{name} must be between {shown(low):g} and {shown(high):g} for these schemes: got {got:g}"
    )


def _out_of_reach(
    error: BudgetError, budget: Budget, elements: int, fixed_bytes: int
) -> UsageError:
    """The budget's bits in the user's own unit, with the lowest and highest possible."""
    if budget.size_bytes is not None:
        least, most = (fixed_bytes + -(-bits // 8) for bits in (error.lowest, error.highest))
        return UsageError(
            f"--size must be at least {least:,} bytes for these schemes ({most:,} at most are of "
            f"use, {fixed_bytes:,} are not to be quantized): got {budget.size_bytes:,}"
        )
    assert budget.avg_bits is not None
    low, high = error.lowest / elements, error.highest / elements
    return out_of_range("--avg-bits", low, high, budget.avg_bits)


@dataclass(frozen=True)
class KnapsackUnit:
    """A unit in the knapsack: one item for the whole of it, or one for each of its slabs."""

    unit: Unit
    options: Sequence[Scheme]
    items: Sequence[Item]
    slabs: bool

    def describe(self, chosen: Sequence[int], scores: Scores) -> dict[str, Any]:
        """The unit's entry in plan.json; `chosen` has an option for each item."""
        entry: dict[str, Any] = {"unit": self.unit.name}
        first = self.unit.linears[0].name
        if self.slabs:
            entry["slabs"] = {
                scheme.name: format_ranges([i for i, c in enumerate(chosen) if c == number])
                for number, scheme in reversed(list(enumerate(self.options)))
                if number in chosen
            }
            if (order := scores.order(first)) is not None:
                entry["order"] = order
        else:
            entry["scheme"] = self.options[chosen[0]].name
        if rotated := [i.name for i in self.unit.linears if scores.rotated(i.name)]:
            entry["rotated"] = rotated
        entry["linears"] = {info.name: "all" for info in self.unit.linears}
        return entry


def _unit_item(unit: Unit, options: Sequence[Scheme], scores: Scores, elements_only: bool) -> Item:
    return Item(
        unit.name,
        tuple(
            sum(s.storage_bits(i.out_features, i.in_features, elements_only) for i in unit.linears)
            for s in options
        ),
        tuple(sum(scores.score(i.name, s) for i in unit.linears) for s in options),
    )


def _slab_items(
    unit: Unit, options: Sequence[Scheme], scores: Scores, width: int, elements_only: bool
) -> list[Item]:
    """One item for each slab that the unit's linears, all of as many columns, share."""
    columns = unit.linears[0].in_features
    rows = sum(info.out_features for info in unit.linears)
    losses = [
        [sum(x) for x in zip(*by_linear, strict=True)]
        for by_linear in (
            [scores.slab_scores(i.name, s, width) for i in unit.linears] for s in options
        )
    ]
    items = []
    for number, start in enumerate(range(0, columns, width)):
        size = min(width, columns - start)
        costs = tuple(s.storage_bits(rows, size, elements_only) for s in options)
        items.append(Item(f"{unit.name}[{number}]", costs, tuple(x[number] for x in losses)))
    return items


def _order_bits(units: Sequence[Unit]) -> int:
    """Bits of the orders of columns that are stored, were every linear to have an order."""
    linears = {info.name: info for unit in units for info in unit.linears}
    stored = [i.in_features for i in linears.values() if not can_order_producer(i, linears)]
    return sum(columns * order_bits(columns) for columns in stored)


@dataclass(frozen=True)
class Problem:
    """The knapsack of a model and its scores: made once, it serves plans of any budget, and curves.

    `items` are the units' items in their order, and one more for the orders of columns where
    slabs are counted whole. `elements` are the units' weights, `slab_columns` is 0 without slabs.
    """

    scores: Scores
    units: Sequence[KnapsackUnit]
    items: Sequence[Item]
    elements: int
    slab_columns: int

    @property
    def unit_of_items(self) -> list[KnapsackUnit]:
        """The unit that each item is of, the item of stored orders left out."""
        return [entry for entry in self.units for _ in entry.items]

    @property
    def linears(self) -> list[LinearInfo]:
        """Those of all units."""
        return [info for entry in self.units for info in entry.unit.linears]

    @classmethod
    def build(
        cls,
        units: Sequence[Unit],
        options: Sequence[Sequence[Scheme]],
        scores: Scores,
        elements_only: bool = False,
        slabs: bool = False,
    ) -> Problem:
        """One of its options for every unit, or for every slab of every unit.

        With `slabs`, the linears of a unit share their input, its columns as the scores arrange
        them. `elements_only` leaves scales and zero points out of the costs.
        """
        ordered = [sorted(o, key=lambda s: (s.storage_bits(128, 4096), s.name)) for o in options]
        width = slab_width([s for o in ordered for s in o]) if slabs else 0
        entries = [
            KnapsackUnit(
                unit,
                schemes,
                _slab_items(unit, schemes, scores, width, elements_only)
                if slabs
                else [_unit_item(unit, schemes, scores, elements_only)],
                slabs,
            )
            for unit, schemes in zip(units, ordered, strict=True)
        ]
        items = [item for entry in entries for item in entry.items]
        if slabs and not elements_only:
            items.append(Item("orders of columns", (_order_bits(units),), (0.0,)))
        elements = sum(info.numel for unit in units for info in unit.linears)
        return cls(scores, entries, items, elements, width)

    def bits(self, budget: Budget, fixed_bytes: int = 0) -> int:
        """What a budget leaves for the items; `fixed_bytes` are the files' other content."""
        if budget.total_bits is not None:
            return budget.total_bits
        if budget.size_bytes is not None:
            return (budget.size_bytes - fixed_bytes) * 8
        # A hair more, so that 4.25 bits of a size that is no power of two still buy 4.25 bits.
        return math.floor((budget.avg_bits or 0.0) * self.elements + 1e-6)

    def cheapest(self) -> Allocation:
        """The plan of fewest bits."""
        choice = tuple(min(range(len(i.costs)), key=i.costs.__getitem__) for i in self.items)
        cost, loss = total(self.items, choice)
        return Allocation(choice, cost, loss, loss)

    def allocate(
        self, budget: Budget, strategy: str, seed: int = 0, fixed_bytes: int = 0
    ) -> Allocation:
        """Raises UsageError where nothing fits, or where more is asked for than is of use."""
        bits = self.bits(budget, fixed_bytes)
        try:
            lowest, highest = cost_range(self.items)
            if budget.avg_bits is not None and budget.avg_bits > shown(highest / self.elements):
                raise BudgetError(bits, lowest, highest)
            return allocate(self.items, bits, strategy, seed)
        except BudgetError as error:
            if budget.total_bits is not None:
                raise
            raise _out_of_reach(error, budget, self.elements, fixed_bytes) from error

    def plan(self, allocation: Allocation, strategy: str, budget: Budget) -> Plan:
        """An allocation of these items, as plan.json has it."""
        left = iter(allocation.choice)
        data: dict[str, Any] = {
            "mixbits_plan": VERSION,
            "strategy": strategy,
            "budget": budget.describe(),
            "weight_scale_mode": self.scores.data["weight_scale_mode"],
            "act_scale_mode": self.scores.data["act_scale_mode"],
            "scores_sha256": self.scores.data["sha256"],
            "method": self.scores.data["method"],
            **({"folded": True} if self.scores.is_folded else {}),
            "predicted_loss": allocation.loss,
            "lower_bound": allocation.lower_bound,
            **({"slab_columns": self.slab_columns} if self.slab_columns else {}),
            "units": [
                entry.describe([next(left) for _ in entry.items], self.scores)
                for entry in self.units
            ],
        }
        return Plan(data, {info.name: info for info in self.linears})


def solve(
    units: Sequence[Unit],
    options: Sequence[Sequence[Scheme]],
    scores: Scores,
    budget: Budget,
    strategy: str,
    seed: int = 0,
    fixed_bytes: int = 0,
    slabs: bool = False,
) -> Plan:
    """One plan: `Problem.build`, `allocate` and `plan` in one call.

    `fixed_bytes` is what the weight files hold beside the units' weights (used by size budgets).
    Raises UsageError where nothing fits.
    """
    problem = Problem.build(units, options, scores, budget.ignore_scale_bits, slabs)
    return problem.plan(problem.allocate(budget, strategy, seed, fixed_bytes), strategy, budget)
