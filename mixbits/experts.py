"""The one loop over experts: measured, fake-quantized and packed experts all run through it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (expert, projection, x [M, K]) -> [M, N]
ExpertLinear = Callable[[int, str, Tensor], Tensor]


def run_experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    act_fn: Callable[[Tensor], Tensor],
    linear: ExpertLinear,
    num_experts: int,
) -> Tensor:
    """Gated experts on hidden [T, H]; every token goes to its experts top_k_index [T, k].

    `linear` applies a projection of an expert. Same result as the `forward` of transformers'
    experts modules; indices of `num_experts` and above mark tokens of other ranks and are
    skipped, as there.
    """
    out = torch.zeros_like(hidden)
    for expert in top_k_index.unique().tolist():
        if expert >= num_experts:
            continue
        token, slot = torch.where(top_k_index == expert)
        x = hidden[token]
        gated = act_fn(linear(expert, "gate_proj", x)) * linear(expert, "up_proj", x)
        y = linear(expert, "down_proj", gated) * top_k_weights[token, slot, None]
        out = out.index_add(0, token, y.to(out.dtype))
    return out
