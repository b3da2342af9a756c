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
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from ..formats.pack import Rounded
from ..measuring.evaluate import sequence_kl
from ..model.layout import LinearInfo
from ..model.streaming import StreamedModel
from ..planning.plan import Plan
from ..progress import numbered
from ..rounding.whole_model import RoundedModel, round_model
from ..source.kept import NO_CODES, OwnCodes

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Candidate:
    """A plan, and the share of `mixbits.rounding.gptq.retarget` that it is rounded with.

    `learned` has its packed weights where they are known already: their rounding was learned
    (`mixbits.rounding.distill`, `mixbits.rounding.signround`), and `how` says so in report.json,
    or they were measured while a budget was sought.
    """

    name: str
    plan: Plan
    share: float
    learned: Rounded | None = None
    how: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """The winner with its packed weights, and a row for every candidate, the best first.

    A row has `name`, `kl` (mean, nats per token), and for all but the winner `behind`: by how
    much it is worse, with `interval`, half the width of a confidence interval of that.
    """

    winner: Candidate
    rounded: Rounded
    rows: list[dict[str, Any]]


def candidates(plans: dict[str, Plan], method: str, share: float) -> list[Candidate]:
    """The plans in their order, the first also without correction; equal plans once."""
    found: list[Candidate] = []
    for name, plan in plans.items():
        if all(plan.assignment != other.plan.assignment for other in found):
            found.append(Candidate(name, plan, share))
    if method == "gptq" and share:
        first = found[0]
        found.insert(1, Candidate(f"{first.name}, correction 0", first.plan, 0.0))
    return found


def judge(
    model: StreamedModel,
    linears: Sequence[LinearInfo],
    candidate: Candidate,
    method: str,
    calibration: Tensor,
    held_out: Tensor,
    batch_size: int = 8,
    first: int = 0,
    own: OwnCodes = NO_CODES,
) -> tuple[Rounded, Tensor]:
    """Round one candidate; its weights, and its mean KL on each held-out sequence, float64.

    Positions before `first` are not judged (`Sequences.judged_from`).
    """
    recipes, rounded = candidate.plan.assignment, candidate.learned
    if rounded is None:
        kept = own.rounded(recipes)
        rounded = round_model(model, linears, recipes, method, calibration, candidate.share, kept)
    quantized = RoundedModel(model, linears, recipes, rounded)
    return rounded, sequence_kl(model, quantized, held_out, batch_size, first)


def choose(
    model: StreamedModel,
    linears: Sequence[LinearInfo],
    candidates: Sequence[Candidate],
    method: str,
    calibration: Tensor,
    held_out: Tensor,
    batch_size: int = 8,
    first: int = 0,
    own: OwnCodes = NO_CODES,
) -> Choice:
    """Round every candidate with the calibration's sequences, and compare on the held-out ones.

    `first` as of `judge`.
    """
    divergences: list[Tensor] = []
    best: tuple[float, int, Rounded] | None = None
    how = calibration, held_out, batch_size, first, own
    for index, candidate in enumerate(numbered(candidates, "candidate")):
        rounded, kl = judge(model, linears, candidate, method, *how)
        divergences.append(kl)
        mean = float(divergences[-1].mean())
        if best is None or mean < best[0]:
            best = mean, index, rounded
    assert best is not None
    rows: list[dict[str, Any]] = [
        {"name": c.name, "kl": float(kl.mean())}
        | ({} if index == best[1] else behind(kl - divergences[best[1]]))
        for index, (c, kl) in enumerate(zip(candidates, divergences, strict=True))
    ]
    rows.sort(key=lambda row: row["kl"])
    return Choice(candidates[best[1]], best[2], rows)


def behind(difference: Tensor) -> dict[str, float]:
    """Mean of paired differences [sequences], and half the width of its confidence interval."""
    quantile = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    stderr = float(torch.std(difference)) / math.sqrt(len(difference))
    return {"behind": float(difference.mean()), "interval": quantile * stderr}
