"""Candidates: plans, each with a way to round it. `candidates` lists those of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..planning.plan import Plan
from .roundings import Distill, Gptq, Outcome, Rounding, SignRound, Subject, plain
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


def candidates(
    settings: Settings, plans: Mapping[str, Plan], correction: float, known: Candidate | None = None
) -> list[Candidate]:
    """What may ship, in the order that they are tried; one, where there is no gate.

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
        return [learned[-1] if learned else Candidate(name, plan, how)]
    found = learned + compared(plans, how)
    if known is None:
        return found
    return [replace(c, outcome=known.outcome) if c.is_like(known) else c for c in found]


def compared(plans: Mapping[str, Plan], how: Rounding) -> list[Candidate]:
    """The plans in their order, the first also without correction; equal plans once."""
    found: list[Candidate] = []
    for name, plan in plans.items():
        if all(plan.assignment != other.plan.assignment for other in found):
            found.append(Candidate(name, plan, how))
    if isinstance(how, Gptq) and how.correction:
        first = found[0]
        found.insert(1, replace(first, name=f"{first.name}, correction 0", rounding=Gptq(0.0)))
    return found
