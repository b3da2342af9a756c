"""The smallest model that meets a quality: `--max-kl`.

The predicted loss falls with the budget, but it is an estimate: what a plan really costs must be
measured, and a measurement takes a model's forward passes. So the prediction only proposes. In
log-log the measured KL is nearly a line over the predicted loss; through the measurements at both
ends of the bracket (one too small, one large enough) that line says which budget should just meet
the limit. The next measurement is taken there, and replaces an end of the bracket, until the
bracket is no wider than the tolerance. Two proposals that do not halve the bracket are followed
by a bisection, so that a prediction which is no good costs time and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import UsageError
from .curve import Point


@dataclass(frozen=True)
class Found:
    """The smallest budget measured to meet the limit, its KL, and every measurement made.

    `too_small` is the largest budget measured to miss the limit below it, if any: KL need not
    fall with every bit, so nothing is claimed of budgets in between or of those not tried.
    """

    budget: int
    kl: float
    too_small: int | None
    measured: dict[int, float]


@dataclass
class _Search:
    """Budgets measured so far, and the bracket: too small, and large enough."""

    points: Sequence[Point]
    measure: Callable[[int], float]
    limit: float
    measured: dict[int, float] = field(default_factory=dict)
    low: int | None = None
    high: int | None = None

    def __post_init__(self) -> None:
        self.budgets = np.array([p.budget for p in self.points], np.float64)
        losses = np.array([p.allocation.loss for p in self.points])
        least = losses[losses > 0].min(initial=1.0)
        self.logs = np.log(np.maximum(losses, least * 1e-3))  # a plan that loses nothing has no log

    def predicted(self, budget: float) -> float:
        """Logarithm of the predicted loss, between points a line."""
        return float(np.interp(budget, self.budgets, self.logs))

    def try_budget(self, budget: int) -> None:
        if budget not in self.measured:
            self.measured[budget] = float(self.measure(budget))
        if not math.isfinite(self.measured[budget]):
            raise UsageError(f"the KL must be finite: got {self.measured[budget]} at {budget} bits")
        if self.measured[budget] <= self.limit:
            self.high = budget
        else:
            self.low = budget

    def propose(self) -> float:
        """The budget at which the calibrated prediction meets the limit."""
        known = [b for b in (self.low, self.high) if b is not None and self.measured[b] > 0]
        target = math.log(self.limit)
        if len(known) == 2:
            x, y = ([f(b) for b in known] for f in (self.predicted, self._log_measured))
            slope = (y[0] - y[1]) / (x[0] - x[1]) if x[0] > x[1] else 1.0
            target = x[1] + (target - y[1]) / slope
        elif known:
            target += self.predicted(known[0]) - self._log_measured(known[0])
        # Losses fall along the curve: read it backwards.
        return float(np.interp(target, self.logs[::-1], self.budgets[::-1]))

    def _log_measured(self, budget: int) -> float:
        return math.log(self.measured[budget])


def smallest(
    points: Sequence[Point],
    measure: Callable[[int], float],
    limit: float,
    tolerance: int,
    most: int = 12,
) -> Found:
    """The smallest budget whose plan is measured to have a KL of at most `limit`.

    `points` is the frontier (at least one point); `measure` takes a budget in bits, between the
    first point's and the last's, and returns the held-out KL of the plan that it buys.

    Ends when a budget at most `tolerance` bits smaller is measured to miss the limit, when the
    smallest budget meets it, or after `most` measurements (one more where none met it).
    Raises UsageError if even the largest budget misses it.
    """
    if not limit > 0:
        raise UsageError(f"a KL limit must be above 0: got {limit}")
    if tolerance < 1:
        raise ValueError(f"tolerance must be at least 1 bit: got {tolerance}")
    search = _Search(points, measure, limit)
    first, last = points[0].budget, points[-1].budget
    widths: list[float] = []
    aside = 0.0
    while len(search.measured) < most:
        low, high = search.low, search.high
        if high == first or low == last:
            break
        if low is not None and high is not None and high - low <= tolerance:
            break
        floor = first if low is None else low
        ceiling = last if high is None else high
        widths.append(ceiling - floor)
        stuck = len(widths) > 2 and widths[-1] > widths[-3] / 2
        guess = (floor + ceiling) / 2 if stuck else search.propose() + aside
        budget = _inside(guess, low, high, first, last, tolerance)
        search.try_budget(budget)
        # Landing on the other side of the limit next time closes the bracket.
        aside = tolerance / 2 if budget == search.low else -tolerance / 2
    if search.high is None:
        search.try_budget(last)
    if search.high is None:
        raise UsageError(
            f"--max-kl {limit:g} is out of reach: the largest plan has a KL of "
            f"{search.measured[last]:.4g}; allow better schemes, or a larger KL"
        )
    return Found(search.high, search.measured[search.high], search.low, search.measured)


def _inside(
    guess: float, low: int | None, high: int | None, first: int, last: int, tolerance: int
) -> int:
    """The budget to try: in the bracket, and a tolerance off the ends that are decided."""
    floor = first if low is None else low + tolerance
    ceiling = last if high is None else high - tolerance
    if floor <= ceiling:
        return round(min(max(guess, floor), ceiling))
    if low is None or high is None:
        return first if low is None else last
    return (low + high) // 2
