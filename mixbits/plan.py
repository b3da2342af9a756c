"""plan.json: which unit gets which scheme, and what that costs.

    {"mixbits_plan": 1, "strategy", "budget", "weight_scale_mode", "act_scale_mode",
     "predicted_loss", "lower_bound", ...,
     "units": [{"unit": name, "scheme": "MXFP4", "linears": {name: "all", ...}}, ...]}

The file may be edited: change a scheme and pass it back with `--plan`. A linear that no unit
names is left alone. "all" says that the scheme covers all column slabs of the linear.

Counting. A budget in average bits counts everything stored for the linears that could be
quantized: codes, scales and zero points, and 16 bits for a linear left alone. Without scale
bits it counts elements only, as the published tables do. A budget in bytes counts the whole
weight files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .allocate import BudgetError, Item, allocate, cost_range
from .formats import BF16, ScaleMode, Scheme, UsageError, parse_scheme
from .model import LinearInfo, Unit, match_units
from .scores import VERSION, Scores, dump, read_json, write_text

Assignment = dict[str, Scheme]  # linear -> scheme


@dataclass(frozen=True)
class Budget:
    """Either `avg_bits` per weight, or `size_bytes` for the weight files."""

    avg_bits: float | None = None
    size_bytes: int | None = None
    ignore_scale_bits: bool = False

    def describe(self) -> dict[str, Any]:
        if self.size_bytes is not None:
            return {"size_bytes": self.size_bytes}
        counted = "elements" if self.ignore_scale_bits else "elements, scales and zero points"
        return {"avg_bits": self.avg_bits, "counted": counted}


def stored_bits(info: LinearInfo, scheme: Scheme, ignore_scale_bits: bool = False) -> int:
    """Bits that one linear takes in one scheme, in either way of counting."""
    if ignore_scale_bits:
        return scheme.element_bits * info.numel
    return scheme.storage_bits(info.out_features, info.in_features)


def average_bits(
    linears: Sequence[LinearInfo], assignment: Assignment, ignore_scale_bits: bool = False
) -> float:
    """Mean bits per weight over `linears`; those without a scheme count 16."""
    bits = sum(stored_bits(i, assignment.get(i.name, BF16), ignore_scale_bits) for i in linears)
    return bits / sum(info.numel for info in linears)


def parse_keep(text: str, modes: tuple[ScaleMode, ScaleMode]) -> tuple[str, Scheme]:
    """`PATTERN=SCHEME` of a `--keep` option."""
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(
            f"--keep must be PATTERN=SCHEME, such as '*.down_proj=MXFP8': got {text!r}"
        )
    return pattern, parse_scheme(name, *modes)


def unit_options(
    units: Sequence[Unit], schemes: Sequence[Scheme], keep: Sequence[tuple[str, Scheme]]
) -> list[list[Scheme]]:
    """The schemes that each unit may take; a kept unit has one. Later `keep` entries win."""
    options = [list(schemes) for _ in units]
    for pattern, scheme in keep:
        for index in match_units(units, pattern):
            options[index] = [scheme]
    return options


@dataclass(frozen=True)
class Plan:
    """The content of plan.json."""

    data: dict[str, Any]

    @property
    def assignment(self) -> Assignment:
        """Linear -> scheme, in the plan's order."""
        modes = self.data["weight_scale_mode"], self.data["act_scale_mode"]
        return {
            name: parse_scheme(unit["scheme"], *modes)
            for unit in self.data["units"]
            for name in unit["linears"]
        }

    @classmethod
    def read(cls, path: Path, linears: Sequence[LinearInfo]) -> Plan:
        """Raises UsageError for a linear that the model lacks, a part of one, or one twice."""
        data = read_json(path, "mixbits_plan")
        known, seen = {info.name for info in linears}, set()
        try:
            for unit in data["units"]:
                for name, slabs in unit["linears"].items():
                    if name not in known:
                        raise UsageError(f"the model has no linear {name} ({path})")
                    if name in seen:
                        raise UsageError(f"two units of a plan share linear {name} ({path})")
                    seen.add(name)
                    if slabs != "all":
                        raise UsageError(
                            f"a scheme must cover 'all' slabs of {name}: got {slabs!r} ({path})"
                        )
            plan = cls(data)
            _ = plan.assignment
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{path} must have scale modes and units with scheme and linears: {error!r}"
            ) from None
        return plan

    def write(self, path: Path) -> None:
        write_text(path, dump(self.data))


def _bits_up(bits: int, elements: int) -> float:
    """Bits per weight, rounded up to what an error message shows."""
    return math.ceil(bits / elements * 1e4) / 1e4


def _out_of_reach(
    error: BudgetError, budget: Budget, elements: int, fixed_bytes: int
) -> UsageError:
    """The budget's bits in the user's own unit, with the lowest and highest possible."""
    if budget.size_bytes is not None:
        low, high = (fixed_bytes + -(-bits // 8) for bits in (error.lowest, error.highest))
        return UsageError(
            f"--size must be at least {low:,} bytes for these schemes ({high:,} at most are of "
            f"use, {fixed_bytes:,} are not to be quantized): got {budget.size_bytes:,}"
        )
    low_bits, high_bits = (_bits_up(b, elements) for b in (error.lowest, error.highest))
    return UsageError(
        f"--avg-bits must be between {low_bits:g} and {high_bits:g} for these schemes: "
        f"got {budget.avg_bits:g}"
    )


def solve(
    units: Sequence[Unit],
    options: Sequence[Sequence[Scheme]],
    scores: Scores,
    budget: Budget,
    strategy: str,
    seed: int = 0,
    fixed_bytes: int = 0,
) -> Plan:
    """Allocate: one of its options for every unit. Raises UsageError where nothing fits.

    `fixed_bytes` is what the weight files hold beside the units' weights (used by size budgets).
    """
    ordered = [sorted(o, key=lambda s: (s.storage_bits(128, 4096), s.name)) for o in options]
    items = [
        Item(
            unit.name,
            tuple(
                sum(stored_bits(i, s, budget.ignore_scale_bits) for i in unit.linears)
                for s in choices
            ),
            tuple(sum(scores.score(i.name, s) for i in unit.linears) for s in choices),
        )
        for unit, choices in zip(units, ordered, strict=True)
    ]
    elements = sum(info.numel for unit in units for info in unit.linears)
    if budget.size_bytes is not None:
        bits = (budget.size_bytes - fixed_bytes) * 8
    else:
        # A hair more, so that 4.25 bits of a size that is no power of two still buy 4.25 bits.
        bits = math.floor((budget.avg_bits or 0.0) * elements + 1e-6)
    try:
        lowest, highest = cost_range(items)
        if budget.avg_bits is not None and budget.avg_bits > _bits_up(highest, elements):
            raise BudgetError(bits, lowest, highest)
        allocation = allocate(items, bits, strategy, seed)
    except BudgetError as error:
        raise _out_of_reach(error, budget, elements, fixed_bytes) from None
    chosen = [choices[c] for choices, c in zip(ordered, allocation.choice, strict=True)]
    data: dict[str, Any] = {
        "mixbits_plan": VERSION,
        "strategy": strategy,
        "budget": budget.describe(),
        "weight_scale_mode": scores.data["weight_scale_mode"],
        "act_scale_mode": scores.data["act_scale_mode"],
        "scores_sha256": scores.data["sha256"],
        "method": scores.data["method"],
        "predicted_loss": allocation.loss,
        "lower_bound": allocation.lower_bound,
        "units": [
            {
                "unit": unit.name,
                "scheme": scheme.name,
                "linears": {info.name: "all" for info in unit.linears},
            }
            for unit, scheme in zip(units, chosen, strict=True)
        ],
    }
    return Plan(data)
