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
    dequantize,
    e8m0_to_float,
    encode,
    round_minifloat,
    scales,
    split_groups,
)
from .schemes import MINIFLOATS, Format

# Shares of a group's range that integer scales are tried for: less range, finer steps.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def _candidates(x: Tensor, fmt: Format) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Scales and zero points [N, groups] worth trying for x [N, K]."""
    if fmt.is_mx:
        scale, _ = scales(x, replace(fmt, scale_mode="floor"))
        yield scale, None  # less would cut off more than it refines
        yield torch.where(scale < 254, scale + 1, scale), None  # 255 means NaN, which stays
        return
    for share in _SHARES:
        yield scales(x * share, fmt)


def search_scales(
    x: Tensor, fmt: Format, column_weight: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Per group of x [N, K], the scale (and zero point) [N, groups] of least squared error.

    column_weight [K]: how much an error in each column counts, such as E[x_k^2]; all alike
    without it. Of equals, the smallest power of two, or the whole range.
    """
    best_scale, best_zero = scales(x, fmt)
    best_error = torch.full(best_scale.shape, torch.inf, device=x.device)
    for scale, zero_point in _candidates(x, fmt):
        codes = encode(x, scale, zero_point, fmt)
        error = (dequantize(Quantized(codes, scale, zero_point), fmt) - x).square()
        if column_weight is not None:
            error = error * column_weight
        sums = _add_up(split_groups(error, fmt.group_size))
        better = sums < best_error
        best_error = torch.where(better, sums, best_error)
        best_scale = torch.where(better, scale, best_scale)
        if zero_point is not None and best_zero is not None:
            best_zero = torch.where(better, zero_point, best_zero)
    return best_scale, best_zero


def _add_up(x: Tensor) -> Tensor:
    """Sums over the last dimension, a power of two, in an order that native code has as well."""
    while x.shape[-1] > 1:
        lower, upper = x.chunk(2, -1)
        x = lower + upper
    return x.squeeze(-1)


def search(x: Tensor, fmt: Format, column_weight: Tensor | None = None) -> Quantized:
    """x [N, K] rounded to nearest with the scales of `search_scales`."""
    scale, zero_point = search_scales(x, fmt, column_weight)
    return Quantized(encode(x, scale, zero_point, fmt), scale, zero_point)


class Snapper(NamedTuple):
    """What rounds values of groups: float scale, and for integers the offset and highest code."""

    scale: Tensor
    offset: Tensor | float
    top: float


def snapper(scale: Tensor, zero_point: Tensor | None, fmt: Format) -> Snapper:
    """For values of one shape with `scale` (and `zero_point`), or that these broadcast to."""
    if fmt.is_mx:
        return Snapper(e8m0_to_float(scale), 0.0, 0.0)
    top = float((1 << fmt.bits) - 1)
    offset = float(1 << (fmt.bits - 1)) if zero_point is None else zero_point.float()
    return Snapper(scale.float(), offset, top)


def snap(x: Tensor, to: Snapper, fmt: Format) -> Tensor:
    """The nearest values of a format to x, float32, such as a column [N, 1] of one group."""
    if fmt.is_mx:
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


def compensate_group(group: Tensor, factor: Tensor, importance: Tensor, fmt: Format) -> Group:
    """Round float32 [N, columns], one group of `fmt`, column by column, with error compensation.

    factor [columns, columns]: row j says how the columns from j on make up for it. importance
    [columns]: how much an error in each counts for the choice of the scale.
    """
    group = group.clone()
    scale, zero_point = search_scales(group, fmt, importance)
    snapped, errors = torch.empty_like(group), torch.empty_like(group)
    grid = snapper(scale, zero_point, fmt)
    for j, row in enumerate(factor):
        column = group[:, j : j + 1]
        snapped[:, j : j + 1] = snap(column, grid, fmt)
        error = (column - snapped[:, j : j + 1]) / row[j]
        group[:, j + 1 :] -= error * row[j + 1 :]
        errors[:, j : j + 1] = error
    return Group(encode(snapped, scale, zero_point, fmt), scale, zero_point, errors)
