"""The held-out gate: several candidates are rounded and really measured, and the best ships.

A plan that is optimal for its scores need not be best for the model. So the allocation's plan is
compared, at the same size and with the same rounding, with the plans that anyone would try first
(all units alike, the layers near the head or near the embedding in more bits) and with a weaker
correction, on text that neither scores nor rounding have seen. What ships has the lowest mean
KL divergence of these: it is never worse than they are there. Differences are paired, sequence by
sequence, since some sequences are harder for every candidate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from ..measuring.evaluate import sequence_kl
from ..progress import numbered
from ..rounding.whole_model import RoundedModel
from .candidates import Candidate
from .roundings import Outcome, Subject

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Decision:
    """The winner, its packed weights, and a row for every candidate, the best first.

    A row has `name`, `kl` (mean, nats per token), and for all but the winner `behind`: by how
    much it is worse, with `interval`, half the width of a confidence interval of that.
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
    kl = sequence_kl(subject.streamed, quantized, ids, batch_size=subject.batch_size, first=first)
    return outcome, kl


def choose(
    subject: Subject, candidates: Sequence[Candidate], ids: Tensor, first: int = 0
) -> Decision:
    """Round every candidate, and compare them on the gate's text; `ids`, `first` as of `judge`.

    One alone needs no comparison, and gets none.
    """
    if len(candidates) == 1:
        return Decision(candidates[0], candidates[0].rounded(subject), [])
    divergences: list[Tensor] = []
    best: tuple[float, int, Outcome] | None = None
    for index, candidate in enumerate(numbered(candidates, "candidate")):
        outcome, kl = judge(subject, candidate, ids, first)
        divergences.append(kl)
        mean = float(kl.mean())
        if best is None or mean < best[0]:
            best = mean, index, outcome
    assert best is not None
    rows: list[dict[str, Any]] = [
        {"name": c.name, "kl": float(kl.mean())}
        | ({} if index == best[1] else behind(kl - divergences[best[1]]))
        for index, (c, kl) in enumerate(zip(candidates, divergences, strict=True))
    ]
    rows.sort(key=lambda row: row["kl"])
    return Decision(candidates[best[1]], best[2], rows)


def behind(difference: Tensor) -> dict[str, float]:
    """Mean of paired differences [sequences], and half the width of its confidence interval."""
    quantile = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    stderr = float(torch.std(difference)) / math.sqrt(len(difference))
    return {"behind": float(difference.mean()), "interval": quantile * stderr}
