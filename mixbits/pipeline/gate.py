"""The held-out gate: several candidates are rounded and really measured, and the best ships.

A plan that is optimal for its scores need not be best for the model. So the allocation's plan is
compared, at the same size and with the same rounding, with the plans that anyone would try first
(all units alike, the layers near the head or near the embedding in more bits), and the best of them
with other roundings of it, on text that neither scores nor rounding have seen. What ships has the
lowest mean KL divergence of these: it is never worse than they are there. Differences are paired,
sequence by sequence, since some sequences are harder for every candidate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..formats.scale_range import ScaleError
from ..measuring.evaluate import interval, mean_stderr, sequence_kl
from ..progress import numbered, say
from ..rounding.whole_model import RoundedModel
from .candidates import Candidate, Contest
from .roundings import Outcome, Subject


@dataclass(frozen=True)
class Decision:
    """The winner, its packed weights, and a row for every candidate, the best first.

    A row has `name`, `kl` (mean, nats per token) with its standard error `kl_stderr`, and for all
    but the winner `behind`: by how much it is worse, with `interval`, half the width of a
    confidence interval of that.
    """

    winner: Candidate
    outcome: Outcome
    rows: list[dict[str, Any]]


def judge(
    subject: Subject, candidate: Candidate, ids: Tensor, first: int = 0
) -> tuple[Outcome, Tensor]:
    """Round one candidate; what it gives, and its mean KL on each sequence, float64.

    `ids` [sequences, length] are the gate's text; positions before `first` are not judged
    (`Sequences.judged_from`).
    """
    outcome, recipes = candidate.rounded(subject), candidate.plan.assignment
    quantized = RoundedModel(subject.streamed, subject.linears, recipes, outcome.weights)
    kl = sequence_kl(subject.reference, quantized, ids, batch_size=subject.batch_size, first=first)
    return outcome, kl


def choose(subject: Subject, contest: Contest, ids: Tensor, first: int = 0) -> Decision:
    """Round the candidates, and compare them on the gate's text; `ids`, `first` as of `judge`.

    One alone needs no comparison, and gets none. One whose formats cannot hold a weight is told of
    and left out. Raises ScaleError where that is so of all.
    """
    if len(contest.first) == 1 and not contest.after(contest.first[0]):
        only = contest.first[0]
        return Decision(only, only.rounded(subject), [])
    judged: list[tuple[Candidate, Tensor]] = []
    best: Decision | None = None
    lowest, refused = math.inf, ScaleError("there is no candidate")

    def compare(candidates: Sequence[Candidate]) -> None:
        nonlocal best, lowest, refused
        for candidate in numbered(candidates, "candidate"):
            try:
                outcome, kl = judge(subject, candidate, ids, first)
            except ScaleError as error:
                say(f"  without {candidate.name}: {error}")
                refused = error
                continue
            judged.append((candidate, kl))
            if best is None or float(kl.mean()) < lowest:
                lowest, best = float(kl.mean()), Decision(candidate, outcome, [])

    compare(contest.first)
    compare(contest.after(contest.first[0] if best is None else best.winner))
    if best is None:
        raise refused
    least = next(kl for candidate, kl in judged if candidate is best.winner)
    rows: list[dict[str, Any]] = []
    for candidate, kl in judged:
        mean, stderr = mean_stderr(kl)
        row = {"name": candidate.name, "kl": mean, "kl_stderr": stderr}
        rows.append(row | ({} if candidate is best.winner else behind(kl - least)))
    return replace(best, rows=sorted(rows, key=lambda row: row["kl"]))


def behind(difference: Tensor) -> dict[str, float]:
    """Mean of paired differences [sequences], and half the width of its confidence interval."""
    mean, stderr = mean_stderr(difference)
    return {"behind": mean, "interval": interval(stderr)}
