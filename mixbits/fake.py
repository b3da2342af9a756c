"""Linears that only pretend to be packed: rounded weights and inputs, kept in float.

This is the definition of a quantized model: the packed one equals it up to the order of
summation.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .arrange import Arrangement, arrangement_of
from .formats import Assignment, Recipe, Scheme
from .linear import check_finite, packed_values, swap_linears
from .model import LinearInfo, weight_of
from .pack import Rounded
from .recognise import is_conv1d


def fake_weight(weight: Tensor, recipe: Recipe) -> Tensor:
    """weight [N, K] arranged and rounded to nearest, float32 [N, K] in the arranged order."""
    arranged = arrangement_of(recipe, weight.device).weight(weight).float()
    parts = recipe.parts(weight.shape[1])
    pieces = arranged.split([columns for _, columns in parts], dim=1)
    rounded = [
        ops.fake_quantize(piece, scheme.weight) if scheme.weight else piece
        for piece, (scheme, _) in zip(pieces, parts, strict=True)
    ]
    return torch.cat(rounded, dim=1)


def fake_input(x: Tensor, recipe: Recipe, arrangement: Arrangement) -> Tensor:
    """x [..., K] arranged, and rounded where the recipe rounds activations.

    In x's dtype, in float32 at least where it is rotated. Of float64, rounding is still that of
    float32. Gradients go straight through the rounding.
    """
    arranged = arrangement.input(x)
    parts = recipe.parts(arranged.shape[-1])
    rounded = []
    for piece, (scheme, _) in zip(
        arranged.split([columns for _, columns in parts], -1), parts, strict=True
    ):
        if scheme.activation is not None:
            narrow = piece.float() if piece.dtype == torch.float64 else piece
            piece = ops.fake_quantize(narrow, scheme.activation).to(piece.dtype)
        rounded.append(piece)
    return rounded[0] if len(rounded) == 1 else torch.cat(rounded, -1)


class FakeLinear(nn.Module):
    """y = Qa(x') Q(W')^T + bias in x's dtype, from a float copy of Q(W') [N, K].

    x may be float64 too: sums are then exact for comparisons, rounding is still that of float32.
    A weight that `is_rounded` already, its columns as x has them, is arranged and kept as it is.
    """

    def __init__(
        self,
        weight: Tensor,
        recipe: Recipe,
        bias: Tensor | None = None,
        is_rounded: bool = False,
    ) -> None:
        super().__init__()
        self.recipe, self.bias = recipe, bias
        self.arrangement = arrangement_of(recipe, weight.device)
        if is_rounded:
            weight = self.arrangement.weight(weight)
        elif recipe.packed:
            weight = fake_weight(weight, recipe)
        self.weight_fake = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rounded = fake_input(x, self.recipe, self.arrangement)
        y = torch.nn.functional.linear(rounded, self.weight_fake.to(rounded.dtype)).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def fake_quantize_model(model: nn.Module, recipes: Assignment) -> None:
    """Replace linears (name -> recipe) by `FakeLinear`: what the packed model must equal."""

    def make(name: str, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
        return FakeLinear(weight, recipes[name], bias)

    swap_linears(model, [n for n, r in recipes.items() if r.packed], make)


def rounds_activations(recipe: Recipe) -> bool:
    parts = (recipe,) if isinstance(recipe, Scheme) else (s for s, _ in recipe.segments)
    return any(scheme.activation is not None for scheme in parts)


def round_activations(model: nn.Module, recipes: Assignment) -> bool:
    """Let a plain model of rounded weights (`round_weights`) round activations as recipes say.

    Whether any linear does.
    """

    def make(name: str, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
        return FakeLinear(weight, recipes[name], bias, is_rounded=True)

    names = [name for name, recipe in recipes.items() if rounds_activations(recipe)]
    swap_linears(model, names, make)
    return bool(names)


def round_weights(
    model: nn.Module,
    linears: Sequence[LinearInfo],
    recipes: Assignment,
    rounded: Rounded = MappingProxyType({}),
) -> None:
    """Round the weights of `linears` in place, in the model's dtype; the model stays plain.

    `rounded` has those that are packed already; the others are rounded to nearest.
    """
    for info in linears:
        recipe = recipes[info.name]
        if not recipe.packed:
            continue
        weight = weight_of(model, info)
        check_finite(info.name, weight)
        arrangement = arrangement_of(recipe, weight.device)
        if info.name in rounded:
            arranged = packed_values(rounded[info.name], recipe, info.in_features)
        else:
            arranged = fake_weight(weight, recipe)
        plain = arrangement.restore(arranged.to(weight.device)).to(weight.dtype)
        check_finite(f"{info.name}, rounded, as {str(weight.dtype).removeprefix('torch.')}", plain)
        if info.is_expert:
            weight.data.copy_(plain)
        else:  # a new parameter, so that a tied embedding keeps its own values
            module: Any = model.get_submodule(info.name)
            plain = plain.T.contiguous() if is_conv1d(module) else plain
            module.weight = nn.Parameter(plain, requires_grad=False)
