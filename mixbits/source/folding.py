"""A model in a rotated basis that computes the same: for engines that rotate nothing on line.

The residual stream x of a model becomes x R, where R multiplies every 32 consecutive columns by the
Hadamard matrix over sqrt(32): an outlier is spread over its block, which is an MX group. A norm
that only divides by the length of x commutes with R, its weight does not, and so goes into what
reads it:

    what writes into the stream, W [width, K]     R^T W, and its bias
    the embedding, rows [width]                   E R
    what reads it after a norm of weight g        W diag(g) R, and g becomes ones
    the head                                      the same, apart from the embedding

A norm's weight also damps what is an outlier to a few channels' readers; when it is folded, that
channel's error is spread over its block undamped. So before they are turned the stream's columns
are put in an order: those that their readers weigh alike lie together (`gathered`).

Within a head, values are turned as well: rows of v_proj, columns of o_proj. Attention only adds
values up, so that what it gives is turned too.

What takes part is seen (`mixbits.model.stream`). Whether all of that leaves the logits as they
are is tried on a small random model of the same class and configuration. A model for which it does
not hold is refused, with the reason, as far as it is known: a LayerNorm subtracts a mean, which a
rotation moves; a norm behind a block has a weight that nothing reads.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError, plain_errors
from ..formats.arrange import hadamard
from ..model.experts import layout_of
from ..model.families import family_of
from ..model.layout import (
    CausalLM,
    LinearInfo,
    decoder_blocks,
    head_is_tied,
    output_head,
    split_expert_name,
)
from ..model.recognise import shared_parameters
from ..model.shrink import small_model
from ..model.stream import Touch, logits_of, stream_of
from ..model.twin import plain_numbers, same

BLOCK = 32
TOLERANCE = 1e-4  # of the largest logit, in float32
_ROWS = 4096  # that are turned at a time
_MOST_BLOCKS = 8  # of a small model

Lookup = Callable[[str], Tensor]  # a parameter of the original, by its name


def block_width(*sizes: int) -> int:
    """Columns that are turned together: a power of two that divides all sizes, 32 at most."""
    return math.gcd(BLOCK, *sizes)


def rotate(x: Tensor, width: int, axis: int = -1) -> Tensor:
    """`x` with every `width` consecutive entries along `axis` turned; in x's dtype."""
    return hadamard(x.movedim(axis, -1), width).movedim(-1, axis) / math.sqrt(width)


@dataclass(frozen=True)
class Turn:
    """A parameter's `axis` is turned in blocks, after multiplication by a norm's weight, if any.

    `reads`: it is the axis of what the parameter is multiplied with. `of_stream`: it runs along
    the stream, and not along a head's values.
    """

    axis: int
    width: int
    reads: bool = False
    norm: str | None = None
    of_stream: bool = True


@dataclass(frozen=True)
class Folding:
    """What becomes of a model's parameters, by name; those that are not named stay.

    turns     parameter -> its turns
    neutral   a norm's parameter -> what it becomes, all of it: 1, or 0 where 1 is added to it
    values    whether values within heads are turned
    order     int64 [width] of the stream's columns, before they are turned; None: as they come
    """

    turns: Mapping[str, tuple[Turn, ...]]
    neutral: Mapping[str, float]
    values: bool
    order: Tensor | None = field(default=None, compare=False)

    @property
    def read(self) -> set[str]:
        """Parameters that are multiplied with something that is turned."""
        return {name for name, turns in self.turns.items() if any(turn.reads for turn in turns)}

    def changes(self, name: str) -> bool:
        return name in self.turns or name in self.neutral

    def folded(self, name: str, original: Tensor, lookup: Lookup) -> Tensor:
        """A parameter of the folded model, in float32; `lookup` gives norms of the original."""
        if name in self.neutral:
            return torch.full_like(original, self.neutral[name], dtype=torch.float32)
        turns = self.turns[name]
        if all(turn.axis for turn in turns):
            rows = original.split(_ROWS)  # a large embedding, a few at a time
            return torch.cat([self._turned(part, turns, lookup) for part in rows])
        return self._turned(original, turns, lookup)

    def _turned(self, value: Tensor, turns: tuple[Turn, ...], lookup: Lookup) -> Tensor:
        value = value.float()
        for turn in turns:
            if turn.norm is not None:
                weight = lookup(turn.norm).float() + (1 - self.neutral[turn.norm])
                value = (value.movedim(turn.axis, -1) * weight).movedim(-1, turn.axis)
            if turn.of_stream and self.order is not None:
                value = value.index_select(turn.axis, self.order)
            value = rotate(value, turn.width, turn.axis)
        return value


def gathered(folding: Folding, lookup: Lookup) -> Folding:
    """With an order of the stream's columns by how much their readers weigh them, least first.

    Noise of a block's inputs goes to all of its columns, and on by the squares of their weights: so
    that large inputs of small weight do least harm to others where these are of small weight too.
    It goes by the mean over the norms of the logarithm of squared weights. `lookup` gives all that
    is turned.
    """
    powers: dict[str, Tensor] = {}
    for name, turns in folding.turns.items():
        for turn in turns:
            if turn.norm is not None:
                rows = lookup(name).movedim(turn.axis, -1).flatten(0, -2).split(_ROWS)
                power = torch.stack([part.float().square().sum(0) for part in rows]).sum(0)
                powers[turn.norm] = powers.get(turn.norm, 0) + power
    logarithms = []
    for norm, power in powers.items():
        weight = lookup(norm).float() + (1 - folding.neutral[norm])
        logarithms.append((weight.square() * power).clamp(min=1e-30).log())
    order = torch.stack(logarithms).mean(0).argsort(stable=True)
    return replace(folding, order=order)


def fold(model: CausalLM, folding: Folding) -> None:
    """Fold a model in place, each parameter in its own dtype; the head is untied."""
    head = output_head(model)[1]
    if head_is_tied(model):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        untie(model.config)
    old = {name: p.detach() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if folding.changes(name):
            new = folding.folded(name, old[name], old.__getitem__)
            parameter.data = new.to(parameter.dtype)


def parameter_of(model: CausalLM, info: LinearInfo) -> str:
    """The parameter that holds a linear's weight."""
    if not info.is_expert:
        return f"{info.name}.weight"
    module, _, projection = split_expert_name(info.name)
    layout = layout_of(model.get_submodule(module))
    assert layout is not None
    return f"{module}.{layout.stack(projection)}"


def untie(config: Any) -> None:
    """Let a configuration say that the head has weights of its own."""
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False


# --- what is to be folded ----------------------------------------------------------------------


def folding_of(shapes: CausalLM, trust_remote_code: bool = False) -> Folding:
    """How a model is folded, which may be without storage.

    Raises UsageError, one sentence that names the class, where its logits would not stay.
    """
    kind = type(shapes).__name__

    def sentence(why: str) -> str:
        return (
            "--rotate fold needs a model that computes the same in a rotated basis: got "
            f"{kind}: {why}"
        )

    if why := _beside_text(shapes):
        raise UsageError(sentence(why))
    blocks = _enough_blocks(shapes)
    if blocks is None:
        raise UsageError(sentence("its blocks are of too many kinds to be tried"))
    with plain_errors(sentence), plain_numbers():
        small = small_model(shapes.config, blocks, trust_remote_code)
        if not _kinds(shapes) <= _kinds(small):
            raise UsageError(sentence("a small one has blocks of other kinds"))
        stream = stream_of(small)
        norms = {name: small.get_submodule(name) for name in stream.norms}
        if whys := [*filter(None, map(_why_unfit, norms, norms.values())), *stream.whys]:
            raise UsageError(sentence(whys[0]))
        neutral = {name: _neutral(norm) for name, norm in norms.items()}
        for values in (True, False):
            tried = _folding(small, stream.touches, neutral, values)
            if holds(small, gathered(tried, _parameters(small).__getitem__)):
                break
        else:
            raise UsageError(sentence("folded on trial, a small one gave other logits"))
        place = _Places(small, shapes)
        touches = [one for touch in stream.touches for one in place.touches(touch)]
        found = {name: value for own, value in neutral.items() for name in place.names(own)}
    whole = _folding(shapes, touches, found, values)
    if why := _unlike(shapes, whole):
        raise UsageError(sentence(why))
    return whole


def _parameters(model: CausalLM) -> dict[str, Tensor]:
    """All by all of their names."""
    return {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}


def holds(model: CausalLM, folding: Folding) -> bool:
    """Whether a model, which stays as it is, gives the same logits when it is folded."""
    twin = copy.deepcopy(model)
    fold(twin, folding)
    return same(logits_of(twin), logits_of(model), TOLERANCE)


def _beside_text(model: CausalLM) -> str | None:
    """What a trial on text would not see."""
    text = {id(p) for p in model.get_decoder().parameters()}
    text |= {id(p) for p in output_head(model)[1].parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in text:
            return f"{name} has to do with more than text"
    embedding = model.get_input_embeddings().weight
    tied = shared_parameters(model)
    names = {n for n, p in model.named_parameters(remove_duplicate=False) if p is embedding}
    others = tied - names - {f"{output_head(model)[0]}.weight"}
    return f"{min(others)} is shared with another" if others else None


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Equal for blocks that differ in sizes and numbers alone."""
    return tuple(
        (
            name,
            type(part),
            *((n, p.dim()) for n, p in part._parameters.items() if p is not None),
            *sorted((k, v) for k, v in part.__dict__.items() if _is_choice(k, v)),
        )
        for name, part in block.named_modules()
    )


def _is_choice(name: str, value: Any) -> bool:
    return isinstance(value, bool | str) and name != "training" and not name.startswith("_")


def _kinds(model: CausalLM) -> set[Any]:
    return {_kind(block) for block in decoder_blocks(model)[1]}


def _enough_blocks(model: CausalLM) -> int | None:
    """How many of the first blocks are of all kinds that there are; two at least."""
    kinds = [_kind(block) for block in decoder_blocks(model)[1]]
    last = max(kinds.index(kind) for kind in kinds) + 1
    return max(2, last) if last <= _MOST_BLOCKS else None


def _why_unfit(name: str, norm: Any) -> str | None:
    """Why a norm does not commute with a rotation, or has more than a weight; None if it does."""
    what, x = f"{name} ({type(norm).__name__})", _rows(norm)
    if same(norm(x + 1), norm(x), TOLERANCE):
        return f"{what} subtracts a mean, which a rotation moves"
    if getattr(norm, "bias", None) is not None:
        return f"{what} has a bias"
    if _neutral(norm) is None:
        return f"{what} does more than divide by a length and multiply by a weight"
    return None


def _rows(norm: Any) -> Tensor:
    return torch.randn(4, norm.weight.shape[0], generator=torch.Generator().manual_seed(3))


def _neutral(norm: Any) -> float | None:
    """What a norm's weight must be for it to divide by a length alone: 1, or 0 if 1 is added."""
    x, weight = _rows(norm), norm.weight.data
    width, found = block_width(x.shape[-1]), norm(x)
    for neutral in (1.0, 0.0):
        norm.weight.data = torch.full_like(weight, neutral)
        base, turned = norm(x), norm(rotate(x, width))
        norm.weight.data = weight
        is_weighted = same(base * (weight + 1 - neutral), found, TOLERANCE)
        if is_weighted and same(rotate(base, width), turned, TOLERANCE):
            return neutral
    return None


def _folding(
    model: CausalLM, touches: Sequence[Touch], neutral: Mapping[str, float | None], values: bool
) -> Folding:
    width = block_width(model.get_input_embeddings().weight.shape[-1])
    turns: dict[str, tuple[Turn, ...]] = {}
    for touch in touches:
        norm = None if touch.norm is None else f"{touch.norm}.weight"
        turn = Turn(touch.axis, width, touch.reads, norm)
        turns[touch.parameter] = (*turns.get(touch.parameter, ()), turn)
    of_values = dict(_turns_of_values(model)) if values else {}
    for parameter, turn in of_values.items():
        turns[parameter] = (*turns.get(parameter, ()), turn)
    found = {f"{name}.weight": value for name, value in neutral.items() if value is not None}
    return Folding(turns, found, bool(of_values))


def _turns_of_values(model: CausalLM) -> Iterator[tuple[str, Turn]]:
    """Those of values' rows and of their readers' columns, by the family's names."""
    *_, value, reader = family_of(model.config.get_text_config()).attention
    for name, module in model.named_modules():
        rows, columns = module._modules.get(value), module._modules.get(reader)
        heads = getattr(module, "head_dim", None)
        if not (isinstance(rows, nn.Linear) and isinstance(columns, nn.Linear) and heads):
            continue
        width = block_width(heads, rows.out_features, columns.in_features)
        for own, _ in rows.named_parameters():
            yield f"{name}.{value}.{own}", Turn(0, width, of_stream=False)
        yield f"{name}.{reader}.weight", Turn(1, width, True, of_stream=False)


def _unlike(model: CausalLM, folding: Folding) -> str | None:
    """What a small model has, and the large one has not."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    width = model.get_input_embeddings().weight.shape[-1]
    for name, turns in folding.turns.items():
        if name not in parameters:
            return f"it has no {name}, as a small one has"
        shape = parameters[name].shape
        if any(turn.norm and shape[turn.axis] != width for turn in turns):
            return f"{name} has {list(shape)}, where a small one has the stream's width"
    return None


class _Places:
    """Where in a large model what was seen in a small one is: in each block of the same kind."""

    def __init__(self, small: CausalLM, large: CausalLM) -> None:
        self.prefix, blocks = decoder_blocks(small)
        kinds = [_kind(block) for block in blocks]
        self.where: dict[int, list[int]] = {}
        for index, block in enumerate(decoder_blocks(large)[1]):
            kind = _kind(block)
            self.where.setdefault(kinds.index(kind), []).append(index)

    def names(self, name: str) -> list[str]:
        match = re.fullmatch(rf"{re.escape(self.prefix)}\.(\d+)\.(.+)", name)
        if match is None:
            return [name]
        return [f"{self.prefix}.{i}.{match[2]}" for i in self.where.get(int(match[1]), ())]

    def touches(self, touch: Touch) -> Iterator[Touch]:
        parameters = self.names(touch.parameter)
        norms = [None] * len(parameters) if touch.norm is None else self.names(touch.norm)
        for parameter, norm in zip(parameters, norms, strict=True):
            yield replace(touch, parameter=parameter, norm=norm)
