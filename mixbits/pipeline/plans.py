"""The plans of a run: what its budget buys, and others of that size to compare it with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import UsageError
from ..measuring.scores import Scores
from ..planning.allocate import Allocation, Item, total
from ..planning.curve import frontier
from ..planning.plan import Budget, Plan, Problem, unit_options
from ..planning.smallest import smallest
from ..progress import part, say
from .candidates import Candidate
from .gate import judge
from .refine import Meter, Picks, refine, two_meters
from .roundings import Subject, plain
from .run import Run
from .settings import Settings
from .texts import Text

SEARCH_TOLERANCE = 0.02  # of --max-kl, in bits per weight


@dataclass(frozen=True)
class Solved:
    """A plan, and the knapsack that it is an allocation of."""

    problem: Problem
    allocation: Allocation
    plan: Plan


@dataclass
class Planned:
    """The plan that was asked for, first, and others of the same size to compare it with.

    Without scores there is the plan that was given, and nothing else. `curve` has the rows of
    `curve.rows`, `found` what report.json says of the search and of `findings.diagnose`, and
    `rounded` the candidate that the search has ended with, its weights rounded.
    """

    plans: dict[str, Plan]
    scores: Scores | None = None
    solved: dict[str, Solved] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    rounded: Candidate | None = None

    @property
    def first(self) -> Solved:
        """The plan that was asked for, solved; or what --refine made of it."""
        return next(iter(self.solved.values()))


def make_problem(run: Run, scores: Scores, slabs: bool, strategy: str = "optimal") -> Problem:
    """The knapsack; of strategies that give units the same option, all units have the same."""
    options = unit_options(run.units, run.schemes, run.keep)
    if strategy == "optimal" and not slabs:
        options = run.own.offer(run.units, options, run.own_schemes)
    return Problem.build(run.units, options, scores, run.settings.ignore_scale_bits, slabs)


def solve(run: Run, problem: Problem, budget: Budget, strategy: str) -> Solved:
    """A plan within the budget."""
    settings = run.settings

    def solved(allocation: Allocation) -> Solved:
        return Solved(problem, allocation, problem.plan(allocation, strategy, budget))

    if settings.size is None:
        return solved(problem.allocate(budget, strategy, settings.seed))
    cheapest = solved(problem.cheapest())
    least = run.predicted_bytes(cheapest.plan.assignment)
    fixed = least - cheapest.allocation.cost // 8
    found = solved(problem.allocate(budget, strategy, settings.seed, fixed))
    while (excess := run.predicted_bytes(found.plan.assignment) - settings.size) > 0:
        fixed += excess  # the header's length depends a little on the plan
        try:
            found = solved(problem.allocate(budget, strategy, settings.seed, fixed))
        except UsageError:
            if least > settings.size or strategy == "uniform":
                raise
            return cheapest
    return found


def budget_of(settings: Settings) -> Budget:
    """The one that is asked for, where it is not to be searched."""
    return Budget(settings.avg_bits, settings.size, settings.ignore_scale_bits)


def make_plans(
    run: Run, scores: Scores, subject: Subject | None = None, text: Text | None = None
) -> Planned:
    """Solve within the budget, or within the smallest one that meets --max-kl.

    For the latter `subject` is rounded and measured, with `text`.
    """
    settings, found, rounded = run.settings, {}, None
    problem = make_problem(run, scores, settings.slabs, settings.strategy)
    if settings.max_kl is None:
        budget = budget_of(settings)
    else:
        assert subject is not None and text is not None
        budget, found["search"], rounded = _smallest_budget(run, subject, problem, text)
    solved = _of_one_size(run, scores, problem, budget)
    plans = {name: entry.plan for name, entry in solved.items()}
    return Planned(plans, scores, solved, found=found, rounded=rounded)


def _of_one_size(run: Run, scores: Scores, problem: Problem, budget: Budget) -> dict[str, Solved]:
    slabs = run.settings.slabs
    layers = make_problem(run, scores, False) if slabs or run.own.formats else problem
    alike = make_problem(run, scores, False, "uniform") if run.own.formats else layers
    name = "slabs" if slabs and run.settings.strategy == "optimal" else run.settings.strategy
    plans = {name: solve(run, problem, budget, run.settings.strategy)}
    for strategy in ("optimal", "uniform", "head", "tail"):
        if strategy not in plans:
            one_of = layers if strategy == "optimal" else alike
            with suppress(UsageError):  # no single scheme may fit
                plans[strategy] = solve(run, one_of, budget, strategy)
    return plans


def _smallest_budget(
    run: Run, subject: Subject, problem: Problem, text: Text
) -> tuple[Budget, dict[str, Any], Candidate | None]:
    """For --max-kl: the budget of the smallest plan found, `search` of report.json, and that plan
    with its rounded weights.
    """
    settings, limit = run.settings, run.settings.max_kl
    assert limit is not None
    how = plain(settings.rounding, text.correction)
    known: dict[tuple[int, ...], float] = {}  # budgets close to each other may buy the same plan
    best: tuple[int, Candidate] | None = None  # the smallest budget that met the limit

    def measured(bits: int) -> float:
        nonlocal best
        solved = solve(run, problem, Budget(total_bits=bits), "optimal")
        choice = solved.allocation.choice
        if choice not in known:
            tried = f"proposal {len(known) + 1}, {bits / problem.elements:.3f} bits"
            candidate = Candidate("optimal", solved.plan, how)
            with part(tried):
                outcome, kls = judge(subject, candidate, text.gate.ids, text.gate.judged_from)
            known[choice] = float(kls.mean())
            if known[choice] <= limit and (best is None or bits < best[0]):
                best = bits, replace(candidate, outcome=outcome)
        kl = known[choice]
        say(f"      {bits / problem.elements:.4f} bits per weight: KL {kl:.4f}")
        return kl

    tolerance = max(1, round(SEARCH_TOLERANCE * problem.elements))
    found = smallest(frontier(problem.items), measured, limit, tolerance)
    rows = [{"avg_bits": b / problem.elements, "kl": kl} for b, kl in found.measured.items()]
    search = {"max_kl": limit, "kl": found.kl, "tolerance": SEARCH_TOLERANCE}
    budget = Budget(total_bits=found.budget, max_kl=limit)
    return budget, {**search, "measured": rows}, best[1] if best else None


def refine_plan(run: Run, subject: Subject, planned: Planned, text: Text) -> None:
    """Put a better plan first, if measuring finds one; `refine` of report.json says how."""
    settings, start = run.settings, planned.first
    problem, budget = start.problem, budget_of(settings)

    def chosen(items: Sequence[Item]) -> Picks:
        measured = replace(problem, items=items)
        return solve(run, measured, budget, "optimal").allocation.choice

    assert settings.refine is not None
    calibration = text.calibration
    whole = Meter(
        subject.streamed, problem, calibration.ids, settings.batch_size, calibration.judged_from
    )
    flips, proposed = two_meters(whole)
    found = refine(
        problem.items,
        start.allocation.choice,
        flips=flips,
        judge=proposed,
        solve=chosen,
        rounds=settings.refine,
    )
    planned.found["refine"] = {
        "nsamples": [len(flips.ids), len(proposed.ids)],
        "rounds": found.rounds,
    }
    if found.plan == start.allocation.choice:
        return
    name, bound = "optimal, refined", start.allocation.lower_bound
    allocation = Allocation(found.plan, *total(problem.items, found.plan), bound)
    plan = problem.plan(allocation, name, budget)
    planned.solved = {name: Solved(problem, allocation, plan), **planned.solved}
    planned.plans = {name: plan, **planned.plans}
