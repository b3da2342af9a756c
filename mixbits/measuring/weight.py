"""The relative error of each weight: `weight`, which needs no text.

The increase of the loss is about linear in the relative squared errors of the linears, each with a
factor of its own (HIGGS, arXiv 2411.17525); here all factors are alike:

    loss(format) = |W - Q(W)|^2 / |W|^2 + |x - Q(x)|^2 / |x|^2,   x ~ N(0, 1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import ops
from ..formats.schemes import Format, Scheme
from ..model.layout import weight_of
from .slabs import SlabScores, Task, slab_sums


def measure_weight(task: Task) -> SlabScores:
    model, schemes, seed = task.model, task.schemes, task.seed
    formats = list(dict.fromkeys(s.weight for s in schemes if s.weight is not None))
    noise = {s.activation: _noise(s.activation, seed) for s in schemes if s.activation is not None}
    scores: SlabScores = {}
    for info in model.visit(task.linears):
        weight = weight_of(model.model, info).detach()
        scores[info.name] = _weight_scores(weight, schemes, formats, noise)
    return scores


def _weight_scores(
    weight: Tensor,
    schemes: Sequence[Scheme],
    formats: Sequence[Format],
    noise: Mapping[Format, float],
) -> dict[str, list[float]]:
    """{scheme: [slabs]} of one linear; a weight of zeros loses nothing."""
    rows, columns = weight.shape
    ones = torch.ones(max(rows, columns), device=weight.device)
    found = ops.fisher_statistics(weight, ones[:rows], ones[:columns], formats)
    errors = dict(
        zip(formats, found / weight.double().square().sum().clamp_min(1e-300), strict=True)
    )
    shares = slab_sums(
        torch.full((columns,), 1 / columns, dtype=torch.float64, device=weight.device)
    )
    result = {}
    for scheme in schemes:
        score = torch.zeros_like(shares) if scheme.weight is None else errors[scheme.weight]
        if scheme.activation is not None:
            score = score + noise[scheme.activation] * shares
        result[scheme.name] = score.tolist()
    return result


def _noise(activation: Format, seed: int) -> float:
    """The relative squared error of rounding normal numbers."""
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(seed))
    return float((x - ops.fake_quantize(x, activation)).square().sum() / x.square().sum())
