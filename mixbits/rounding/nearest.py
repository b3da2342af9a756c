"""Weights and inputs rounded to the nearest values of their formats, linear by linear.

This is the definition that packed linears must equal, up to the order of summation.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..formats.arrange import Arrangement, arrangement_of
from ..formats.pack import Packed, Rounded, check_finite
from ..formats.scale_range import check_scales
from ..formats.schemes import Assignment, Recipe, Scheme
from ..model.layout import LinearInfo, weight_of
from ..model.recognise import is_conv1d


def check_packed(name: str, weight: Tensor, scheme: Scheme, packed: Packed) -> Packed:
    """`packed` itself. Raises UsageError that names a tensor whose scales cannot hold `weight`."""
    check_scales(name, weight, scheme, packed)
    return packed


def pack_weight(name: str, weight: Tensor, scheme: Scheme) -> Packed:
    """Quantize and pack a weight [N, K] of any float dtype.

    Raises UsageError that names the tensor if it is not finite, or too large or small for scales.
    """
    check_finite(name, weight)
    return check_packed(name, weight, scheme, ops.quantize_pack(weight, scheme.format))


def pack_recipe(name: str, weight: Tensor, recipe: Recipe) -> list[Packed]:
    """`pack_weight` of every part of a recipe, the weight [N, K] arranged as it says."""
    check_finite(name, weight)
    arranged = arrangement_of(recipe, weight.device).weight(weight)
    parts = recipe.parts(weight.shape[1])
    pieces = arranged.split([columns for _, columns in parts], dim=1)
    return [pack_weight(name, w, s) for w, (s, _) in zip(pieces, parts, strict=True)]


def packed_values(packed: Sequence[Packed], recipe: Recipe, in_features: int) -> Tensor:
    """The float32 [N, K] that packed parts stand for, in the arranged order."""
    pieces = [
        ops.dequantize(one, scheme.format, columns)
        for one, (scheme, columns) in zip(packed, recipe.parts(in_features), strict=True)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


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


def rounds_activations(recipe: Recipe) -> bool:
    return any(scheme.activation is not None for scheme, _ in recipe.segments)


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
