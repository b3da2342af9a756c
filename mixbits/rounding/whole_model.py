"""Round the weights of a whole model, with or without error compensation, and run the result.

Error compensation (`mixbits.rounding.gptq`) goes through the blocks once, in order, with two
streams of hidden states: the original model's and the quantized one's. A block first runs on the
original stream, and the inputs of its linears are kept; then on the quantized stream, where every
linear is rounded at the moment it is called, from the inputs that reach it behind all that is
rounded already, and answers with its rounded weight. So each linear sees the errors of those
before it, in its own block too, at the cost of two forwards. All sequences go through a block at
once: the peak is one block, the hidden states of both streams, and the inputs of one block's
linears.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import UsageError
from ..formats.arrange import arrangement_of
from ..formats.compensate import search
from ..formats.pack import Packed, Rounded, check_finite, pack
from ..formats.schemes import Assignment, Recipe
from ..model.layout import LinearInfo, output_head, weight_of
from ..model.probing import probed
from ..model.streaming import StreamedModel, patched
from ..progress import steps
from .gptq import Curvature, corrected, gptq
from .methods import CORRECTION, METHODS
from .nearest import check_packed, fake_input, pack_recipe, packed_values


def _searched(name: str, weight: Tensor, recipe: Recipe) -> list[Packed]:
    """Every part of the arranged weight [N, K], with searched scales."""
    parts = recipe.parts(weight.shape[1])
    pieces = arrangement_of(recipe, weight.device).weight(weight).float()
    packed = []
    for piece, (scheme, _) in zip(pieces.split([n for _, n in parts], 1), parts, strict=True):
        codes = pack(search(piece, scheme.format), scheme.format)
        packed.append(check_packed(name, piece, scheme, codes))
    return packed


class _Compensation:
    """The two streams' state while a model is rounded."""

    def __init__(
        self, linears: Sequence[LinearInfo], recipes: Assignment, correction: float, own: Rounded
    ) -> None:
        # An expert sees other tokens in the two streams, and the head one stream only.
        self.corrections = {
            i.name: 0.0 if i.peers or i.block is None else correction for i in linears
        }
        self.recipes, self.own = recipes, own
        self.rounded: dict[str, list[Packed]] = {}
        self.recording = False
        # Of the original stream, by linear, and its version: in-place changes raise it.
        self._inputs: dict[str, tuple[Tensor, int | None]] = {}
        self._last: _Inputs | None = None

    def probe(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Stands for a linear of either stream."""
        if self.recording or name not in self.recipes:  # an expert may have been left alone
            if self.corrections.get(name):
                self._inputs[name] = (x, _version(x))
            return torch.nn.functional.linear(x, weight, bias)
        recipe = self.recipes[name]
        inputs = self._seen(name, x, recipe)
        packed = self._round(name, weight, recipe, inputs)
        self.rounded[name] = [part.to("cpu") for part in packed]
        w = packed_values(packed, recipe, x.shape[-1])
        return torch.nn.functional.linear(inputs.rounded, w, bias)

    def _seen(self, name: str, x: Tensor, recipe: Recipe) -> _Inputs:
        """What the linear's input comes to; q, k and v, and gate and up, mostly share it."""
        last, (original, version) = self._last, self._inputs.pop(name, (None, None))
        if original is not None and _version(original) != version:
            original = None  # written over since: it says nothing any more
        if last is None or not last.fits(x, recipe):
            last = self._last = _Inputs(x, recipe, original)
        return last

    def _round(self, name: str, weight: Tensor, recipe: Recipe, inputs: _Inputs) -> list[Packed]:
        if name in self.own:
            return [part.to(weight.device) for part in self.own[name]]
        arranged = inputs.arrangement.weight(weight.float())
        if inputs.cross is not None:
            arranged = corrected(arranged, inputs.curvature, inputs.cross, self.corrections[name])
        parts = recipe.parts(weight.shape[1])
        formats = [(scheme.format, columns) for scheme, columns in parts]
        codes = gptq(arranged, inputs.curvature, formats, ops.compensate_group)
        pieces = arranged.split([columns for _, columns in parts], 1)
        return [
            check_packed(name, piece, scheme, pack(q, fmt))
            for piece, q, (fmt, _), (scheme, _) in zip(pieces, codes, formats, parts, strict=True)
        ]


class _Inputs:
    """One linear's inputs in the quantized stream: arranged, rounded, and their moments."""

    def __init__(self, x: Tensor, recipe: Recipe, original: Tensor | None) -> None:
        self.x, self.version, self.prepared = x, _version(x), _preparation(recipe)
        self.arrangement = arrangement_of(recipe, x.device)
        self.rounded = fake_input(x, recipe, self.arrangement)
        rows = self.rounded.flatten(0, -2)
        self.curvature = Curvature(rows.T @ rows / len(rows), len(rows))
        self.cross = None
        if original is not None:  # E[x xq^T]
            arranged = self.arrangement.input(original.flatten(0, -2))
            self.cross = arranged.T @ rows / len(rows)

    def fits(self, x: Tensor, recipe: Recipe) -> bool:
        """Whether these are of x, as it is now, and for such a recipe."""
        is_same = self.x is x and self.version is not None and self.version == _version(x)
        return is_same and self.prepared == _preparation(recipe)


def _version(x: Tensor) -> int | None:
    """How often x has been written to; None if it does not know."""
    return None if x.is_inference() else x._version


def _preparation(recipe: Recipe) -> object:
    """What two recipes must agree on for their inputs to be prepared alike."""
    formats = tuple((scheme.activation, columns) for scheme, columns in recipe.segments)
    return formats, recipe.order, recipe.rotated


@torch.no_grad()
def _compensate(
    model: StreamedModel,
    linears: Sequence[LinearInfo],
    recipes: Assignment,
    ids: Tensor,
    correction: float,
    own: Rounded,
) -> dict[str, list[Packed]]:
    work = _Compensation(linears, recipes, correction, own)
    quantized: list[Any] = []
    advance = steps(len(model.blocks), 2 * len(ids))

    def block(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        work.recording = True
        out = model.run_block(index, hidden, *args, **kwargs)
        work.recording = False
        before = quantized.pop() if quantized else hidden
        after = model.run_block(index, before, *args, **kwargs)
        advance()
        if index == len(model.blocks) - 1:
            return after
        quantized.append(after[0] if isinstance(after, tuple) else after)
        return out

    head_name, head = output_head(model.model)
    with probed(model.model, linears, work.probe), ExitStack() as stack:
        if head_name not in recipes:  # nobody asks for logits
            stack.enter_context(patched(head, lambda x: x[..., :1]))
        model.run(ids, block)
    return work.rounded


def round_model(
    model: StreamedModel,
    linears: Sequence[LinearInfo],
    recipes: Assignment,
    method: str = "gptq",
    ids: Tensor | None = None,
    correction: float = CORRECTION,
    own: Rounded = MappingProxyType({}),
) -> dict[str, list[Packed]]:
    """Pack every linear that has a recipe: linear -> its parts, on the CPU.

    method  rtn     round to nearest
            search  the same, with the scale of least error for each group
            gptq    error compensation, with the inputs of token ids [sequences, length];
                    `correction` is explained at `mixbits.rounding.gptq.corrected`

    `own` has linears that are packed already (`mixbits.source.kept`).

    Raises UsageError that names the tensor for a weight that cannot be packed.
    """
    if method not in METHODS:
        raise UsageError(f"--rounding must be one of {', '.join(METHODS)}: got {method!r}")
    chosen = [i for i in linears if i.name in recipes and recipes[i.name].packed]
    for info in chosen:
        check_finite(info.name, weight_of(model.model, info))
    rounded: dict[str, list[Packed]] = {}
    if method == "gptq":
        if ids is None or not len(ids):
            raise UsageError("--rounding gptq needs calibration text")
        packed = {i.name: recipes[i.name] for i in chosen}
        rounded = _compensate(model, chosen, packed, ids, correction, own)
    rounded |= {name: list(parts) for name, parts in own.items() if name in recipes}
    left = [info for info in chosen if info.name not in rounded]
    advance = steps(len(left), len(model.blocks) / max(1, len(chosen)))
    for info in left:  # without compensation, and experts that no token reached
        weight = weight_of(model.model, info).detach()
        pack_one = pack_recipe if method == "rtn" else _searched
        rounded[info.name] = pack_one(info.name, weight, recipes[info.name])
        advance()
    return rounded


def rounded_linear(x: Tensor, weight: Tensor, recipe: Recipe, bias: Tensor | None) -> Tensor:
    """y [..., N] in x's dtype: x [..., K] arranged and rounded, `weight` [N, K] so already."""
    rounded = fake_input(x, recipe, arrangement_of(recipe, x.device))
    return torch.nn.functional.linear(rounded, weight.to(rounded.dtype), bias).to(x.dtype)


class RoundedModel:
    """A streamed model that runs as if `rounded` were its weights: what `compare` needs."""

    def __init__(
        self,
        model: StreamedModel,
        linears: Sequence[LinearInfo],
        recipes: Assignment,
        rounded: Rounded,
    ) -> None:
        self.model = model
        self.linears = [i for i in linears if i.name in rounded]
        self.recipes, self.rounded = recipes, rounded

    def logits(self, ids: Tensor) -> Tensor:
        """Logits [B, S, V] of token ids [B, S]."""

        def probe(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if name not in self.rounded:  # an expert that was left alone
                return torch.nn.functional.linear(x, weight, bias)
            recipe = self.recipes[name]
            packed = [part.to(x.device) for part in self.rounded[name]]
            return rounded_linear(x, packed_values(packed, recipe, x.shape[-1]), recipe, bias)

        with probed(self.model.model, self.linears, probe):
            return self.model.logits(ids)
