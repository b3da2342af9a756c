"""The order and the basis in which a linear sees its input columns.

An *arrangement* first puts the columns in another order, then may rotate them: every 32
consecutive ones are multiplied by the Hadamard matrix H of +-1, which spreads an outlier over
its block. H is symmetric and H H = 32, so that x W^T = (x H) (W H / 32)^T; both factors are powers
of two away from a rotation, and MX blocks are indifferent to those. The last columns, if fewer
than 32, are left as they are.

Inputs are arranged when a model runs, weights once. Orders make columns that suffer alike lie
together; rotations are of use where activations are quantized (QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError
from .schemes import MX_GROUP, Recipe

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_order(order: Tensor, in_features: int, name: str = "an order", where: str = "") -> None:
    """Raise UsageError unless `order` is one of `in_features` columns; its storage must hold it.

    Kernels trust it: a wrong one would give a column twice, or address memory beyond the input.
    """
    if order.dtype not in _INTEGERS:
        raise UsageError(f"{name} must hold integers: got {order.dtype}{where}")
    if order.shape != (in_features,):
        raise UsageError(
            f"{name} must have shape ({in_features},): got {tuple(order.shape)}{where}"
        )
    if not order.is_meta and order.sort().values.tolist() != list(range(in_features)):
        raise UsageError(f"{name} must hold each of {in_features} columns once{where}")


def hadamard(x: Tensor, width: int = MX_GROUP) -> Tensor:
    """x [..., K] -> x H, `width` columns at a time, a power of two: in x's dtype.

    A round of sums for each bit of a column's number, in one order.
    """
    whole = x.shape[-1] // width * width
    y = x[..., :whole].unflatten(-1, (whole // width, width))
    half = 1
    while half < width:
        pairs = y.unflatten(-1, (-1, 2, half))
        a, b = pairs.unbind(-2)
        y = torch.stack([a + b, a - b], -2).flatten(-3)
        half *= 2
    return torch.cat([y.flatten(-2), x[..., whole:]], -1)


@dataclass(frozen=True)
class Arrangement:
    """`order` int64 [K] or None (as they come), and whether the ordered columns are rotated."""

    order: Tensor | None = None
    rotated: bool = False

    def input(self, x: Tensor) -> Tensor:
        """x [..., K] as the arranged weight wants it; rotated sums are in float32 at least."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        if self.rotated:
            x = hadamard(x if x.dtype == torch.float64 else x.float())
        return x

    def weight(self, weight: Tensor) -> Tensor:
        """The arranged weight [N, K]; rotated, in float32 at least. Gradients of x too."""
        arranged = self.input(weight)
        if self.rotated:
            whole = arranged.shape[-1] // MX_GROUP * MX_GROUP
            arranged[..., :whole] /= MX_GROUP
        return arranged

    def restore(self, arranged: Tensor) -> Tensor:
        """The inverse of `weight`, up to rounding where it is rotated."""
        weight = hadamard(arranged) if self.rotated else arranged
        if self.order is not None:
            weight = torch.empty_like(weight).index_copy_(-1, self.order, weight)
        return weight


def arrangement_of(recipe: Recipe, device: torch.device | str = "cpu") -> Arrangement:
    """What a recipe does to the columns."""
    order = None if recipe.order is None else torch.tensor(recipe.order, device=device)
    return Arrangement(order, recipe.rotated)
