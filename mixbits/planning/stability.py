"""Can a plan be trusted, and what would come next: figures for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .allocate import Item, allocate, as_items
from .knapsack import Items


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0; equal values share the mean of theirs."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    ranks: NDArray[np.float64] = (last - (count + 1) / 2)[group]
    return ranks


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation of two sequences, equal values sharing a rank; NaN if either is constant."""
    x, y = (_ranks(np.asarray(v, np.float64)) for v in (a, b))
    if x.shape != y.shape:
        raise ValueError(f"rank correlation needs pairs: got {len(x)} and {len(y)} values")
    x, y = x - x.mean() if len(x) else x, y - y.mean() if len(y) else y
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


@dataclass(frozen=True)
class Swap:
    """One item taking another option: what that adds to the bits and to the predicted loss."""

    item: int
    before: int
    after: int
    bits: int
    loss: float

    @property
    def per_bit(self) -> float:
        """Loss saved per bit bought, or added per bit given back."""
        return -self.loss / self.bits


def _swaps(
    items: Items, choice: Sequence[int], dearer: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Per item its next option, the bits and the loss added; 0 bits where there is none."""
    rows, now = np.arange(len(items)), np.asarray(choice, np.int64)
    bits = items.costs - items.costs[rows, now][:, None]
    loss = items.losses - items.losses[rows, now][:, None]
    usable = bits > 0 if dearer else bits < 0
    rate = np.where(usable, -loss / np.where(usable, bits, 1), -np.inf if dearer else np.inf)
    option = rate.argmax(1) if dearer else rate.argmin(1)
    found = usable[rows, option]
    return option, np.where(found, bits[rows, option], 0), loss[rows, option]


def next_swaps(
    items: Sequence[Item] | Items,
    choice: Sequence[int],
    dearer: bool,
    count: int = 10,
    units: Sequence[Any] | None = None,
) -> list[Swap]:
    """The `count` items that would change next: upgrades (`dearer`) or downgrades, best first.

    Each item goes to the option that saves most per bit, or loses least per bit given back.
    `units[i]` names what item i belongs to, such as the linear of a slab: only the best item of
    each is listed.
    """
    table = as_items(items)
    option, bits, loss = _swaps(table, choice, dearer)
    able = np.flatnonzero(bits)
    rate = -loss[able] / bits[able]
    order = able[np.argsort(-rate if dearer else rate, kind="stable")]
    found: list[Swap] = []
    seen: set[Any] = set()
    for i in order.tolist():
        name = i if units is None else units[i]
        if name not in seen:
            seen.add(name)
            swap = Swap(i, int(choice[i]), int(option[i]), int(bits[i]), float(loss[i]))
            found.append(swap)
        if len(found) == count:
            break
    return found


def stability(
    items: Sequence[Item] | Items, halves: Sequence[Sequence[Item] | Items], budget: int
) -> dict[str, Any]:
    """How much plans depend on the calibration: `halves` are `items` with losses of one half each.

    same_units, same_bits: shares of items, and of the budget's bits, on which the two halves'
    plans agree (bits of an item count where it takes the same option in both). excess_loss: per
    half, the loss of its plan by all scores, above that of the plan from all scores, as a share.
    """
    table = as_items(items)
    plans = [allocate(half, budget) for half in halves]
    first, second = (np.array(plan.choice) for plan in plans)
    same = first == second
    bits = table.costs[np.arange(len(table)), first]
    best = allocate(table, budget).loss
    losses = [table.total(plan.choice)[1] for plan in plans]
    return {
        "same_units": float(same.mean()),
        "same_bits": float(bits[same].sum() / bits.sum()),
        "excess_loss": [loss / best - 1 if best > 0 else 0.0 for loss in losses],
    }
