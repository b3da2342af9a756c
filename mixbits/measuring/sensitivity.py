"""How much the model's predictions suffer when one linear is stored in one format.

`fisher` (default). The KL divergence between the model and its perturbed self is, to second
order, a quadratic form in the change of each linear's output; its matrix is the Fisher
information, estimated with labels drawn from the model's own softmax. With g = d loss / d output
and gW = d loss / d input of a linear, the Kronecker-diagonal form of it needs four vectors per
linear and no gradient of a weight:

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

`deltaloss` (AutoScheme's definition, Intel AutoRound; SignRoundV2, arXiv 2512.04746). The first
order, at the model in which every linear is quantized to the format: per batch of sequences
|dL/dW (W - Q(W))| summed over the weight plus |dL/dX (X - Q(X))| summed over tokens and columns,
L the cross entropy of the text. Gradients pass straight through rounded activations. It takes a
forward and a backward per format, since each format has a model of its own.

`weight` needs no text. The increase of the loss is about linear in the relative squared errors of
the linears, each with a factor of its own (HIGGS, arXiv 2411.17525); here all factors are alike:

    loss(format) = |W - Q(W)|^2 / |W|^2 + |x - Q(x)|^2 / |x|^2,   x ~ N(0, 1)

All are sums over input columns, so that the score of every 32-column slab comes with that of
the linear. Columns that suffer alike can be put beside each other first: `sorted_columns` finds
their order, and `measure` takes it, since the blocks that share a scale are others then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import ops
from ..errors import UsageError
from ..formats.arrange import Arrangement
from ..formats.schemes import MX_GROUP, Format, Scheme
from ..model.layout import LinearInfo, weight_of
from ..model.probing import probed
from ..model.streaming import Progress, StreamedModel
from ..progress import BACKWARD, steps

# So many sequences err in their sampling as much as taking tokens for independent does: by half.
PRIOR_SEQUENCES = 8
LABEL_CHUNK = 512  # tokens whose probabilities are held at once while labels are drawn
SlabScores = dict[str, dict[str, list[float]]]  # linear -> scheme -> score per 32-column slab
Arrangements: TypeAlias = Mapping[str, Arrangement]  # linear -> how its columns are arranged


def _slabs(columns: Tensor) -> Tensor:
    """float64 [..., K] -> [..., slabs]: sums over 32 columns, the last slab may be short."""
    pad = -columns.shape[-1] % MX_GROUP
    padded = torch.nn.functional.pad(columns, (0, pad))
    return padded.unflatten(-1, (-1, MX_GROUP)).sum(-1)


# --- Fisher ----------------------------------------------------------------------------------


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


def _effects(x: Tensor, weight: Tensor, grad: Tensor, grad_x: Tensor, scheme: Scheme) -> Tensor:
    """float64 [sequences, slabs]: sum over tokens of g_t . (what rounding a slab adds to y_t).

    x, grad_x [sequences, T, K], weight [N, K] (all three arranged), grad [sequences, T, N].
    """
    rounded, rounded_x = _rounded(x, weight, scheme)
    effects = rounded_x * (grad @ (rounded - weight).to(grad.dtype))
    if scheme.activation is not None:
        effects += (rounded_x - x) * grad_x
    return _slabs(effects.sum(1, dtype=torch.float64))


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
        arranged = arrangement.input(x)
        rows = arranged.reshape(-1, x.shape[-1])
        moments.tokens += rows.shape[0]
        squares, *moves = ops.square_sums(rows, activations)
        moments.x = moments.x + squares
        for fmt, moved in zip(activations, moves, strict=True):
            moments.dx[fmt] = moments.dx.get(fmt, 0.0) + moved
        ctx.save_for_backward(weight, *[arranged] * bool(spread))
        ctx.moments, ctx.arrangement, ctx.spread = moments, arrangement, spread
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        gw = grads[0] @ weight
        moments: _Moments = ctx.moments
        moments.g = moments.g + ops.square_sums(grads[0].reshape(-1, weight.shape[0]), [])[0]
        arranged = ctx.arrangement.weight(gw)
        moments.gw = moments.gw + ops.square_sums(arranged.reshape(-1, weight.shape[1]), [])[0]
        for x in inputs:
            moments.sequences += len(x)
            arranged_weight = ctx.arrangement.weight(weight)
            for scheme in ctx.spread:
                effects = _effects(x, arranged_weight, grads[0], arranged, scheme)
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


def _idle_experts(
    linears: Sequence[LinearInfo], reached: Collection[str]
) -> list[tuple[list[str], list[str]]]:
    """Of every projection of a block's experts: those that were reached, and those that were not.

    The latter, where there are any, take what the former have on average. Otherwise they would look
    free of charge, and any text outside the calibration would pay.
    """
    groups: dict[str, list[str]] = {}
    for info in linears:
        if info.peers is not None:
            groups.setdefault(info.peers, []).append(info.name)
    parts = [
        ([n for n in names if n in reached], [n for n in names if n not in reached])
        for names in groups.values()
    ]
    return [(active, idle) for active, idle in parts if idle]


def _pattern_of(info: LinearInfo) -> str:
    """What --ignore calls a linear and those like it: all experts of a block, or one projection."""
    if info.peers is not None:
        return f"{info.peers.rpartition('.')[0]}.*"
    return f"*.{info.name.rpartition('.')[2]}"


def _check_reached(linears: Sequence[LinearInfo], reached: Collection[str]) -> None:
    """Raises UsageError for a linear that no gradient reached: it would look free of charge.

    Not for an expert that one of its peers can stand for.
    """
    seen = {i.peers for i in linears if i.name in reached} - {None}
    idle = [i for i in linears if i.name not in reached and i.peers not in seen]
    if idle:
        patterns = dict.fromkeys(map(_pattern_of, idle))
        options = " ".join(f"--ignore '{pattern}'" for pattern in patterns)
        raise UsageError(
            f"linears must be called to be measured: got {len(idle)} that no token of the text "
            "reached, or whose weights the model uses in another way; take more text, or leave "
            f"them as they are: {options} ({idle[0].name})"
        )


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
            score = score + _slabs(moments.gw * moments.dx[scheme.activation])
        score = score / (2 * moments.tokens)
        if scheme in moments.spread:
            share = moments.sequences / (moments.sequences + PRIOR_SEQUENCES)
            score = (1 - share) * score + share / 2 * moments.spread[scheme]
        result[scheme.name] = (score / all_tokens).tolist()
    return result


def _collect(
    model: StreamedModel,
    linears: Sequence[LinearInfo],
    schemes: Sequence[Scheme],
    batches: Sequence[Tensor],
    seed: int,
    progress: Progress,
    arrangements: Arrangements,
) -> dict[str, _Moments]:
    """Second moments of every linear, of its columns as arranged."""
    moments = {info.name: _Moments() for info in linears}
    activations = list(dict.fromkeys(s.activation for s in schemes if s.activation is not None))
    spread = [s for s in schemes if s.weight is not None]
    remembered = {info.name for info in linears if info.remembered}

    def probe(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if name not in moments or not torch.is_grad_enabled():  # an expert may be left alone
            return torch.nn.functional.linear(x, weight, bias)
        arrangement = arrangements.get(name, Arrangement())
        is_read_later = x.dim() == 3 and name in remembered
        how = activations, arrangement, spread if is_read_later else []
        out: Tensor = _FisherLinear.apply(x, weight, bias, moments[name], *how)
        return out

    loss = _sampled_label_loss(torch.Generator(model.device).manual_seed(seed))
    with probed(model.model, linears, probe):
        for ids in batches:
            model.forward_backward(ids, loss, progress)
    reached = {name for name, m in moments.items() if m.reached}
    _check_reached(linears, reached)
    for active, idle in _idle_experts(linears, reached):
        moments |= dict.fromkeys(idle, _mean([moments[name] for name in active]))
    return moments


def _measure_fisher(
    model: StreamedModel,
    linears: Sequence[LinearInfo],
    schemes: Sequence[Scheme],
    batches: Sequence[Tensor],
    seed: int,
    progress: Progress,
    arrangements: Arrangements,
) -> SlabScores:
    moments = _collect(model, linears, schemes, batches, seed, progress, arrangements)
    tokens = sum(ids.numel() for ids in batches)
    scores = {}
    for info in model.visit(linears):
        weight = weight_of(model.model, info).detach()
        weight = arrangements.get(info.name, Arrangement()).weight(weight)
        scores[info.name] = _fisher_scores(weight, moments[info.name], schemes, tokens)
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
    progress = _progress(model, len(ids), 2 * len(batches) * len(model.blocks))
    moments = _collect(model, linears, [scheme], batches, seed, progress, {})
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


# --- DeltaLoss -------------------------------------------------------------------------------


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
        rounded, rounded_x = _rounded(x, weight, scheme)
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
            record += _slabs(moved.sum(0, dtype=torch.float64))
        return grad_x, None, None, None, None, None


def _rounded(x: Tensor, weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    rounded_x = x if scheme.activation is None else ops.fake_quantize(x, scheme.activation)
    return ops.fake_quantize(weight, scheme.format), rounded_x


def _next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross entropy of the text, as transformers computes it for labels = input_ids."""
    flat = logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(flat, ids[:, 1:].flatten())


def _measure_deltaloss(
    model: StreamedModel,
    linears: Sequence[LinearInfo],
    schemes: Sequence[Scheme],
    batches: Sequence[Tensor],
    seed: int,
    progress: Progress,
    arrangements: Arrangements,
) -> SlabScores:
    scores: SlabScores = {info.name: {} for info in linears}
    for scheme in schemes:
        records = {
            info.name: torch.zeros(
                -(-info.in_features // MX_GROUP), dtype=torch.float64, device=model.device
            )
            for info in linears
        }
        if scheme.weight is not None:
            _deltaloss_pass(model, linears, scheme, batches, records, progress)
        for name, record in records.items():
            scores[name][scheme.name] = record.tolist()
    return scores


def _deltaloss_pass(
    model: StreamedModel,
    linears: Sequence[LinearInfo],
    scheme: Scheme,
    batches: Sequence[Tensor],
    records: dict[str, Tensor],
    progress: Progress,
) -> None:
    """Add the scores of one scheme to `records`, at the model quantized to it everywhere."""

    def probe(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if name not in records:  # an expert that is left alone
            return torch.nn.functional.linear(x, weight, bias)
        if not torch.is_grad_enabled():
            rounded, rounded_x = _rounded(x, weight, scheme)
            return torch.nn.functional.linear(rounded_x, rounded, bias)
        how = scheme, records[name], lambda: reached.add(name)
        out: Tensor = _DeltaLossLinear.apply(x, weight, bias, *how)
        return out

    reached: set[str] = set()
    with probed(model.model, linears, probe):
        for ids in batches:
            model.forward_backward(ids, _next_token_loss, progress)
    _check_reached(linears, reached)
    for active, idle in _idle_experts(linears, reached):
        mean = torch.stack([records[name] for name in active]).mean(0)
        records |= dict.fromkeys(idle, mean)


# --- Weight ----------------------------------------------------------------------------------


def _measure_weight(
    model: StreamedModel,
    linears: Sequence[LinearInfo],
    schemes: Sequence[Scheme],
    batches: Sequence[Tensor],
    seed: int,
    progress: Progress,
    arrangements: Arrangements,
) -> SlabScores:
    formats = list(dict.fromkeys(s.weight for s in schemes if s.weight is not None))
    noise = {s.activation: _noise(s.activation, seed) for s in schemes if s.activation is not None}
    scores: SlabScores = {}
    for info in model.visit(linears):
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
    shares = _slabs(torch.full((columns,), 1 / columns, dtype=torch.float64, device=weight.device))
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


_MEASURES = {
    "fisher": _measure_fisher,
    "deltaloss": _measure_deltaloss,
    "weight": _measure_weight,
}
METHODS = tuple(_MEASURES)


def _progress(model: StreamedModel, sequences: int, calls: int) -> Progress:
    """For `calls` calls while every sequence is differentiated through all blocks."""
    return steps(calls, BACKWARD * sequences * len(model.blocks) / max(1, calls))


def measure(
    model: StreamedModel,
    linears: Sequence[LinearInfo],
    schemes: Sequence[Scheme],
    ids: Tensor,
    method: str = "fisher",
    batch_size: int = 8,
    seed: int = 0,
    arrangements: Arrangements = MappingProxyType({}),
) -> SlabScores:
    """Score every scheme on every linear with calibration tokens ids [sequences, length].

    `arrangements` has the linears whose columns are ordered or rotated; slabs are of these.
    Returns {linear: {scheme: [score of each 32-column slab]}}; a linear's score is the sum.
    `fisher` is in nats per token, `deltaloss` in nats of the batches' mean losses, added up;
    `weight` takes no tokens and has no unit.
    Raises UsageError for an unknown method, or where the model's loss is not finite.
    """
    if method not in METHODS:
        raise UsageError(f"method must be one of {', '.join(METHODS)}: got {method!r}")
    if arrangements and method != "fisher":
        raise UsageError(
            f"{method} scores columns as they come: ordered or rotated ones need fisher"
        )
    if method == "fisher":  # a sum over tokens, so batches are nobody's business
        batch_size = min(batch_size, model.tokens_at_once() // ids.shape[1] or batch_size)
    batches = list(ids.split(batch_size)) if method != "weight" else []
    passes = sum(s.weight is not None for s in schemes) if method == "deltaloss" else 1
    calls = 2 * passes * len(batches) * len(model.blocks)
    progress = _progress(model, passes * len(ids), calls)
    scores = _MEASURES[method](model, linears, schemes, batches, seed, progress, arrangements)
    for name, by_scheme in scores.items():
        for scheme_name, slabs in by_scheme.items():
            if not all(s == s and abs(s) != float("inf") for s in slabs):
                raise UsageError(
                    f"scores must be finite: got NaN or infinity for {scheme_name} ({name}); "
                    "the model itself overflows on the calibration text"
                )
    return scores
