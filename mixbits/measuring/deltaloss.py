"""The first order of the loss, at the model that is quantized already: `deltaloss`.

It is AutoScheme's definition (Intel AutoRound; SignRoundV2, arXiv 2512.04746). At the model in
which every linear is quantized to the format, per batch of sequences |dL/dW (W - Q(W))| summed over
the weight plus |dL/dX (X - Q(X))| summed over tokens and columns, L the cross entropy of the text.
Gradients pass straight through rounded activations. It takes a forward and a backward per format,
since each format has a model of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..formats.schemes import MX_GROUP, Scheme
from ..model.probing import probed
from .reached import fill_idle
from .slabs import SlabScores, Task, slab_sums


def _rounded_linear(x: Tensor, weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Q(W) and Q(x) of a linear in `scheme`, in their own dtypes; x may stay as it is."""
    rounded_x = x if scheme.activation is None else ops.fake_quantize(x, scheme.activation)
    return ops.fake_quantize(weight, scheme.format), rounded_x


class _DeltaLossLinear(torch.autograd.Function):
    """A fully quantized linear, straight-through, that records |g dW| and |gX dX|."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scheme: Scheme,
        record: Tensor,
        reach: Callable[[], None],
    ) -> Tensor:
        """x [..., K], weight [N, K] -> [..., N]; `reach` is called once a gradient comes back."""
        rounded, rounded_x = _rounded_linear(x, weight, scheme)
        ctx.save_for_backward(x, weight, rounded, rounded_x)
        ctx.scheme, ctx.record, ctx.reach = scheme, record, reach
        return torch.nn.functional.linear(rounded_x, rounded, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rounded, rounded_x = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_weight = grad.T @ rounded_x.reshape(-1, weight.shape[1])
        ctx.reach()
        record: Tensor = ctx.record
        record += ops.gradient_statistics(weight, grad_weight, [ctx.scheme.weight])[0]
        grad_x = grads[0] @ rounded
        if ctx.scheme.activation is not None:
            moved = (grad_x * (x - rounded_x)).abs().flatten(0, -2)
            record += slab_sums(moved.sum(0, dtype=torch.float64))
        return grad_x, None, None, None, None, None


def _next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross entropy of the text, as transformers computes it for labels = input_ids."""
    flat = logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(flat, ids[:, 1:].flatten())


def measure_deltaloss(task: Task) -> SlabScores:
    scores: SlabScores = {info.name: {} for info in task.linears}
    for scheme in task.schemes:
        records = {
            info.name: torch.zeros(
                -(-info.in_features // MX_GROUP), dtype=torch.float64, device=task.model.device
            )
            for info in task.linears
        }
        if scheme.weight is not None:
            _deltaloss_pass(task, scheme, records)
        for name, record in records.items():
            scores[name][scheme.name] = record.tolist()
    return scores


def _deltaloss_pass(task: Task, scheme: Scheme, records: dict[str, Tensor]) -> None:
    """Add the scores of one scheme to `records`, at the model quantized to it everywhere."""

    def probe(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if name not in records:  # an expert that is left alone
            return torch.nn.functional.linear(x, weight, bias)
        if not torch.is_grad_enabled():
            rounded, rounded_x = _rounded_linear(x, weight, scheme)
            return torch.nn.functional.linear(rounded_x, rounded, bias)
        how = scheme, records[name], lambda: reached.add(name)
        out: Tensor = _DeltaLossLinear.apply(x, weight, bias, *how)
        return out

    reached: set[str] = set()
    with probed(task.model.model, task.linears, probe):
        for ids in task.batches:
            task.model.forward_backward(ids, _next_token_loss, task.progress)
    fill_idle(records, task.linears, reached, lambda parts: torch.stack(list(parts)).mean(0))
