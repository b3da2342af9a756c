"""The second order of the loss in the change of each linear's output: `fisher`, the default.

The KL divergence between the model and its perturbed self is, to second order, a quadratic form in
the change of each linear's output; its matrix is the Fisher information, estimated with labels
drawn from the model's own softmax. With g = d loss / d output and gW = d loss / d input of a
linear, the Kronecker-diagonal form of it needs four vectors per linear and no gradient of a weight:

    loss(format) = tokens/2 sum_k [ E[x_k^2] sum_o E[g_o^2] (W - Q(W))_ok^2
                                    + E[(gW)_k^2] E[(x_k - Q(x_k))^2] ]

One forward and one backward serve all formats: the formats differ only in the last pass over W.
The unit is nats per token, an estimate of the KL divergence.

This takes the errors of tokens for independent. Those of keys and values are not: all later tokens
read them, and what they have in common adds up (values: 1.2 to 2 times the loss) or cancels in the
softmax (keys). Their quadratic form is taken over whole sequences instead, slab by slab:

    loss(format) = 1/2 sum_sequences (sum_t g_t . e_t)^2,   e_t = Q(W) Q(x_t) - W x_t

It is unbiased but, with one draw of labels, as uncertain as a mean of so many squared normal
variables. So the two are mixed, the more towards the second the more sequences there are.

The same moments tell which columns suffer most: `sorted_columns`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..formats.arrange import Arrangement
from ..formats.schemes import MX_GROUP, Format, Scheme
from ..model.layout import LinearInfo, weight_of
from ..model.probing import probed
from ..model.streaming import StreamedModel
from .reached import fill_idle
from .slabs import SlabScores, Task, progress_of, slab_sums

# So many sequences err in their sampling as much as taking tokens for independent does: by half.
PRIOR_SEQUENCES = 8
LABEL_CHUNK = 512  # tokens whose probabilities are held at once while labels are drawn


@dataclass
class _Moments:
    """Sums over tokens, float64: x_k^2, g_o^2, (gW)_k^2 and, per format, (x - Q(x))_k^2.

    `spread` has sums over `sequences`, per scheme and slab: (sum_t g_t . e_t)^2.
    """

    tokens: int = 0
    sequences: int = 0
    x: Tensor | float = 0.0
    g: Tensor | float = 0.0
    gw: Tensor | float = 0.0
    dx: dict[Format, Tensor | float] = field(default_factory=dict)
    spread: dict[Scheme, Tensor | float] = field(default_factory=dict)

    @property
    def reached(self) -> bool:
        """Whether a gradient came back; a linear may be called for what the loss does not see."""
        return isinstance(self.g, Tensor)


def _effects(
    x: Tensor, weight: Tensor, grad: Tensor, grad_x: Tensor, schemes: Sequence[Scheme]
) -> Iterator[tuple[Scheme, Tensor]]:
    """float64 [sequences, slabs]: sum over tokens of g_t . (what rounding a slab adds to y_t).

    x, grad_x [sequences, T, K], weight [N, K] (all three arranged), grad [sequences, T, N].
    Schemes that share a weight's format, or that of activations, share what follows from it.
    """
    rounded = functools.cache(lambda fmt: x if fmt is None else ops.fake_quantize(x, fmt))
    for fmt in dict.fromkeys(scheme.format for scheme in schemes):
        moved = grad @ (ops.fake_quantize(weight, fmt) - weight).to(grad.dtype)
        for scheme in (s for s in schemes if s.format == fmt):
            rounded_x = rounded(scheme.activation)
            effects = rounded_x * moved
            if scheme.activation is not None:
                effects += (rounded_x - x) * grad_x
            yield scheme, slab_sums(effects.sum(1, dtype=torch.float64))


class _FisherLinear(torch.autograd.Function):
    """A linear that records second moments, and computes no gradient of its weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        moments: _Moments,
        activations: Sequence[Format],
        arrangement: Arrangement,
        spread: Sequence[Scheme],
    ) -> Tensor:
        """x [..., K], weight [N, K] -> [..., N]; for `spread`, x is [sequences, T, K]."""
        arranged = arrangement.input(x)
        rows = arranged.reshape(-1, x.shape[-1])
        moments.tokens += rows.shape[0]
        squares, *moves = ops.square_sums(rows, activations)
        moments.x = moments.x + squares
        for fmt, moved in zip(activations, moves, strict=True):
            moments.dx[fmt] = moments.dx.get(fmt, 0.0) + moved
        ctx.save_for_backward(weight, arranged if spread else None)
        ctx.moments, ctx.arrangement, ctx.spread = moments, arrangement, spread
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, x = ctx.saved_tensors
        gw = grads[0] @ weight
        moments: _Moments = ctx.moments
        moments.g = moments.g + ops.square_sums(grads[0].reshape(-1, weight.shape[0]), [])[0]
        arranged = ctx.arrangement.weight(gw)
        moments.gw = moments.gw + ops.square_sums(arranged.reshape(-1, weight.shape[1]), [])[0]
        if x is not None:
            moments.sequences += len(x)
            arranged_weight = ctx.arrangement.weight(weight)
            tensors = x, arranged_weight, grads[0], arranged
            for scheme, effects in _effects(*tensors, ctx.spread):
                moments.spread[scheme] = moments.spread.get(scheme, 0.0) + effects.square().sum(0)
        return gw, None, None, None, None, None, None


def _draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """int64 [T, 1]: an index of each row [T, V], drawn with the row's probabilities.

    torch.multinomial draws a random number for every entry, which takes longer than a softmax.
    """
    sums = probabilities.cumsum(-1)
    at = torch.rand(len(sums), 1, generator=generator, device=sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, at, right=True).clamp_(max=sums.shape[1] - 1)


def _sampled_label_loss(generator: torch.Generator) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross entropy, summed over tokens, with labels drawn from the model's own softmax."""

    def loss(logits: Tensor, ids: Tensor) -> Tensor:
        flat = logits.flatten(0, -2).float()
        with torch.no_grad():  # in parts: sampling holds several copies of the probabilities
            parts = [_draw(part.softmax(-1), generator) for part in flat.split(LABEL_CHUNK)]
        labels = torch.cat(parts).squeeze(-1)
        return torch.nn.functional.cross_entropy(flat, labels, reduction="sum")

    return loss


def _mean(parts: Sequence[_Moments]) -> _Moments:
    count, first = len(parts), parts[0]
    return _Moments(
        tokens=max(1, round(sum(m.tokens for m in parts) / count)),
        sequences=round(sum(m.sequences for m in parts) / count),
        x=sum(m.x for m in parts) / count,
        g=sum(m.g for m in parts) / count,
        gw=sum(m.gw for m in parts) / count,
        dx={fmt: sum(m.dx[fmt] for m in parts) / count for fmt in first.dx},
        spread={s: sum(m.spread[s] for m in parts) / count for s in first.spread},
    )


def _fisher_scores(
    weight: Tensor, moments: _Moments, schemes: Sequence[Scheme], all_tokens: int
) -> dict[str, list[float]]:
    """Scores of one linear, nats per token: {scheme: [slabs]}."""
    slabs = -(-weight.shape[1] // MX_GROUP)
    zero = torch.zeros(slabs, dtype=torch.float64, device=weight.device)
    formats = list(dict.fromkeys(s.weight for s in schemes if s.weight is not None))
    if not formats:
        return {s.name: zero.tolist() for s in schemes}
    assert isinstance(moments.g, Tensor) and isinstance(moments.x, Tensor)
    assert isinstance(moments.gw, Tensor)
    rows, columns = moments.g.float(), moments.x.float()
    errors = dict(zip(formats, ops.fisher_statistics(weight, rows, columns, formats), strict=True))
    result = {}
    for scheme in schemes:
        score = zero if scheme.weight is None else errors[scheme.weight]
        if scheme.activation is not None:
            score = score + slab_sums(moments.gw * moments.dx[scheme.activation])
        score = score / (2 * moments.tokens)
        if scheme in moments.spread:
            share = moments.sequences / (moments.sequences + PRIOR_SEQUENCES)
            score = (1 - share) * score + share / 2 * moments.spread[scheme]
        result[scheme.name] = (score / all_tokens).tolist()
    return result


def _collect(task: Task) -> dict[str, _Moments]:
    """Second moments of every linear, of its columns as arranged."""
    model, linears, schemes = task.model, task.linears, task.schemes
    moments = {info.name: _Moments() for info in linears}
    activations = list(dict.fromkeys(s.activation for s in schemes if s.activation is not None))
    spread = [s for s in schemes if s.weight is not None]
    remembered = {info.name for info in linears if info.remembered}

    def probe(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if name not in moments or not torch.is_grad_enabled():  # an expert may be left alone
            return torch.nn.functional.linear(x, weight, bias)
        arrangement = task.arrangements.get(name, Arrangement())
        is_read_later = x.dim() == 3 and name in remembered
        how = activations, arrangement, spread if is_read_later else []
        out: Tensor = _FisherLinear.apply(x, weight, bias, moments[name], *how)
        return out

    loss = _sampled_label_loss(torch.Generator(model.device).manual_seed(task.seed))
    with probed(model.model, linears, probe):
        for ids in task.batches:
            model.forward_backward(ids, loss, task.progress)
    reached = {name for name, m in moments.items() if m.reached}
    fill_idle(moments, linears, reached, _mean)
    return moments


def measure_fisher(task: Task) -> SlabScores:
    moments, model = _collect(task), task.model
    tokens = sum(ids.numel() for ids in task.batches)
    scores = {}
    for info in model.visit(task.linears):
        weight = weight_of(model.model, info).detach()
        weight = task.arrangements.get(info.name, Arrangement()).weight(weight)
        scores[info.name] = _fisher_scores(weight, moments[info.name], task.schemes, tokens)
    return scores


def _column_scores(weight: Tensor, moments: _Moments, scheme: Scheme) -> Tensor:
    """float64 [K]: what each input column contributes to the linear's score, unscaled."""
    if scheme.weight is None:
        return torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    assert isinstance(moments.g, Tensor) and isinstance(moments.x, Tensor)
    error = (weight.float() - ops.fake_quantize(weight.float(), scheme.weight)).square()
    score = moments.x * (moments.g.float() @ error)
    if scheme.activation is not None:
        score = score + moments.gw * moments.dx[scheme.activation]
    return score / moments.tokens


def sorted_columns(
    model: StreamedModel,
    linears: Sequence[LinearInfo],
    readers: Sequence[Sequence[LinearInfo]],
    scheme: Scheme,
    ids: Tensor,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Arrangement]:
    """An order of columns, the most sensitive to `scheme` first, for each group of `readers`.

    The linears of a group read one input and get one order. ids [sequences, length].
    """
    batches = list(ids.split(batch_size))
    progress = progress_of(model, len(ids), 2 * len(batches) * len(model.blocks))
    moments = _collect(Task(model, linears, [scheme], batches, seed, progress))
    scores = {
        info.name: _column_scores(weight_of(model.model, info).detach(), moments[info.name], scheme)
        for info in model.visit([info for group in readers for info in group])
    }
    orders: dict[str, Arrangement] = {}
    for group in readers:
        columns = sum(scores[info.name] for info in group)
        assert isinstance(columns, Tensor)
        order = columns.argsort(descending=True, stable=True).to(model.device)
        orders |= {info.name: Arrangement(order) for info in group}
    return orders
