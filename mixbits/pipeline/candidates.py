"""Candidates: plans, each with a way to round it. `contest` has those of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ..planning.plan import Plan
from .roundings import Distill, Gptq, Outcome, Rounding, Search, SignRound, Subject, plain
from .settings import Settings


@dataclass(frozen=True)
class Candidate:
    """A plan and how it is rounded; `outcome` where that has been done already."""

    name: str
    plan: Plan
    rounding: Rounding
    outcome: Outcome | None = None

    def rounded(self, subject: Subject) -> Outcome:
        """Its packed weights, made or known."""
        return self.outcome or self.rounding(subject, self.plan.assignment)

    def is_like(self, other: Candidate) -> bool:
        """Whether both give the same weights."""
        same = self.rounding == other.rounding
        return same and self.plan.assignment == other.plan.assignment


@dataclass(frozen=True)
class Contest:
    """What may ship. `first` are compared; then what `after` makes of the best of them, with it."""

    first: list[Candidate]
    after: Callable[[Candidate], list[Candidate]] = lambda best: []


def contest(
    settings: Settings, plans: Mapping[str, Plan], correction: float, known: Candidate | None = None
) -> Contest:
    """What may ship, in the order that it is tried; one candidate, where there is no gate.

    The first of `plans` is the one that was asked for. What is `known` is not rounded again.
    """
    name, plan = next(iter(plans.items()))
    how = plain(settings.rounding, correction)
    learned: list[Candidate] = []
    if settings.tune:
        learned.append(Candidate(f"{name}, tuned", plan, SignRound(settings.tune)))
    if settings.distill:
        learned.append(Candidate(f"{name}, distilled", plan, Distill(settings.distill, how)))
    if not settings.is_gated or len(plans) == 1:
        return Contest([learned[-1] if learned else Candidate(name, plan, how)])
    found = compared(plans, how)

    def reused(ones: list[Candidate]) -> list[Candidate]:
        if known is None:
            return ones
        return [replace(c, outcome=known.outcome) if c.is_like(known) else c for c in ones]

    def after(best: Candidate) -> list[Candidate]:
        ones = learned + reused(found.after(best))
        if known is None or any(c.is_like(known) for c in found.first + ones):
            return ones
        return [*ones, known]  # which keeps what --max-kl asks for

    return Contest(reused(found.first), after)


def compared(plans: Mapping[str, Plan], how: Rounding) -> Contest:
    """The plans, equal ones once, by searched scales where compensation is asked for; the best is
    compensated then, also without correction.

    Plans differ by far more than their roundings do, and compensation takes far more time than a
    search. Where there is little text, or text of another kind, it can do harm: what it is worth is
    seen beside the search.
    """
    rounding, suffix = (Search(), ", search") if isinstance(how, Gptq) else (how, "")
    first: list[Candidate] = []
    for name, plan in plans.items():
        if all(plan.assignment != other.plan.assignment for other in first):
            first.append(Candidate(name + suffix, plan, rounding))

    def after(best: Candidate) -> list[Candidate]:
        if not isinstance(how, Gptq):
            return []
        name = best.name.removesuffix(suffix)
        found = [Candidate(name, best.plan, how)]
        if how.correction:
            found.append(Candidate(f"{name}, correction 0", best.plan, Gptq(0.0)))
        return found

    return Contest(first, after)
