"""Scales of least error, and a group of columns rounded with error compensation.

Source: the column loop of GPTQ (Frantar et al., arXiv 2210.17323).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import (
    Quantized,
    Scales,
    dequantize,
    encode,
    factors,
    offsets,
    round_minifloat,
    scales,
    split_groups,
    tensor_scale,
)
from .schemes import MINIFLOATS, Format

# Shares of a group's range that integer scales are tried for: less range, finer steps.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
# Of an NVFP4 block's maximum: at 1.5 it becomes 4 instead of 6, where codes lie closer (the 4/6
# rule of Cook et al., arXiv 2512.02010); the others are a sweep, as in llm-compressor.
_NV_SHARES = (1.0, 1.5, *(0.8 + 0.05 * i for i in range(12)))
NV_LARGEST_SCALE = 256.0  # so that shares up to 1.75 stay within e4m3


def search_tensor_scale(x: Tensor, fmt: Format) -> Tensor | None:
    """The tensor's scale that leaves the search of block scales its room; None without one."""
    return tensor_scale(x, fmt, NV_LARGEST_SCALE) if fmt.tensor_scale else None


def _candidates(x: Tensor, fmt: Format, divisor: Tensor | None) -> Iterator[Scales]:
    """Scales of the groups of x [N, K] worth trying."""
    if fmt.scale == "e8m0":
        scale = scales(x, replace(fmt, scale_mode="floor")).scale
        yield Scales(scale)  # less would cut off more than it refines
        yield Scales(torch.where(scale < 254, scale + 1, scale))  # 255 means NaN, which stays
        return
    for share in _NV_SHARES if fmt.scale == "e4m3" else _SHARES:
        yield scales(x * share, fmt, divisor)


def search_scales(
    x: Tensor,
    fmt: Format,
    column_weight: Tensor | None = None,
    divisor: Tensor | None = None,
) -> Scales:
    """Per group of x [N, K], the scale and zero point of least squared error.

    column_weight [K]: how much an error in each column counts, such as E[x_k^2]; all alike
    without it. Of equals, the smallest power of two, or the whole range. `divisor` is the scale of
    the tensor that x is a part of; without it x is the whole.
    """
    divisor = search_tensor_scale(x, fmt) if divisor is None else divisor
    best = scales(x, fmt, divisor)
    best_error = torch.full(best.scale.shape, torch.inf, device=x.device)
    for found in _candidates(x, fmt, divisor):
        error = (dequantize(Quantized(encode(x, found, fmt), *found), fmt) - x).square()
        if column_weight is not None:
            error = error * column_weight
        sums = _add_up(split_groups(error, fmt.group_size))
        better = sums < best_error
        best_error = torch.where(better, sums, best_error)
        scale = torch.where(better, found.scale, best.scale)
        zero_point = best.zero_point
        if zero_point is not None and found.zero_point is not None:
            zero_point = torch.where(better, found.zero_point, zero_point)
        best = Scales(scale, zero_point, divisor)
    return best


def _add_up(x: Tensor) -> Tensor:
    """Sums over the last dimension, in an order that native code has as well.

    Halves are added; of a row, no power of two, the odd element out is added to its neighbour.
    """
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = torch.cat((x[..., :-2], x[..., -2:-1] + x[..., -1:]), -1)
            continue
        lower, upper = x.chunk(2, -1)
        x = lower + upper
    return x.squeeze(-1)


def search(x: Tensor, fmt: Format, column_weight: Tensor | None = None) -> Quantized:
    """x [N, K] rounded to nearest with the scales of `search_scales`."""
    found = search_scales(x, fmt, column_weight)
    return Quantized(encode(x, found, fmt), *found)


class Snapper(NamedTuple):
    """What rounds values of groups: their factor, and for integers the offset and highest code."""

    scale: Tensor
    offset: Tensor
    top: float

    def of_groups(self) -> Snapper:
        """The same for values [..., groups, group]."""
        return Snapper(self.scale.unsqueeze(-1), self.offset.unsqueeze(-1), self.top)


def snapper(scales: Scales, fmt: Format) -> Snapper:
    """For values [..., groups] that scales of this shape belong to, or that these broadcast to."""
    top = 0.0 if fmt.is_float else float((1 << fmt.bits) - 1)
    return Snapper(factors(scales, fmt), offsets(scales, fmt), top)


def snap(x: Tensor, to: Snapper, fmt: Format) -> Tensor:
    """The nearest values of a format to x, float32, such as a column [N, 1] of one group."""
    if fmt.is_float:
        return round_minifloat(x / to.scale, MINIFLOATS[fmt.element]) * to.scale
    return (((x / to.scale).round() + to.offset).clamp(0, to.top) - to.offset) * to.scale


class Group(NamedTuple):
    """A group of columns, rounded: codes uint8 [N, columns], scale and zero point [N, 1], and what
    the other columns are to make up for, float32 [N, columns], in units of the factor's diagonal.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    errors: Tensor


def compensate_group(
    group: Tensor,
    factor: Tensor,
    importance: Tensor,
    fmt: Format,
    divisor: Tensor | None = None,
    known: Scales | None = None,
) -> Group:
    """Round float32 [N, columns], one group of `fmt`, column by column, with error compensation.

    factor [columns, columns]: row j says how the columns from j on make up for it. importance
    [columns]: how much an error in each counts for the choice of the scale. `divisor` is the scale
    of the whole tensor, where the format has one. `known` scales are taken instead of a search:
    the columns may then be some of a group.
    """
    group = group.clone()
    found = known or search_scales(group, fmt, importance, divisor)
    snapped, errors = torch.empty_like(group), torch.empty_like(group)
    grid = snapper(found, fmt)
    for j, row in enumerate(factor):
        column = group[:, j : j + 1]
        snapped[:, j : j + 1] = snap(column, grid, fmt)
        error = (column - snapped[:, j : j + 1]) / row[j]
        group[:, j + 1 :] -= error * row[j + 1 :]
        errors[:, j : j + 1] = error
    return Group(encode(snapped, found, fmt), found.scale, found.zero_point, errors)
