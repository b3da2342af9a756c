"""Choose codes better than rounding each weight to the nearest does, within the same formats.

search  Every group takes, of a few scales, that of least squared error. With an MX block these
        are the power of two of the OCP rule and the next larger one; with integers the group's
        range and fractions of it.

gptq    Columns are rounded one after the other, and each one's error is made up for by the
        columns still to come, as well as the inputs' second moments allow (GPTQ, Frantar et al.,
        arXiv 2210.17323; the order of columns is that of the linear). The second moments are of
        the inputs as they arrive in the quantized model, rounded activations and all, and a share
        of the difference to the original model's inputs is made up for as well (`retarget`).

Everything here is exact torch in float32 and float64, on any device, one linear at a time;
`mixbits.ops.compensate_group` is the same, to the bit, as native code for CPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .formats import MINIFLOATS, Format
from .reference import (
    Quantized,
    dequantize,
    e8m0_to_float,
    encode,
    round_minifloat,
    scales,
    split_groups,
)

METHODS = ("rtn", "search", "gptq")
DAMPING = 0.01  # of the mean of the diagonal, added to second moments (GPTQ's percdamp)
_BLOCK = 128  # columns, a multiple of every group size
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


# --- error compensation ----------------------------------------------------------------------


class Curvature:
    """Second moments E[xq xq^T] [K, K] of a linear's inputs, and what is made of them once.

    In float64, and damped to be safe to invert; an input that is always 0 counts as 1.
    """

    def __init__(self, moments: Tensor) -> None:
        self.moments = moments.double()
        self.damped = self.moments.clone()
        diagonal = self.damped.diagonal()
        diagonal += DAMPING * diagonal.mean()
        diagonal[diagonal == 0] = 1.0

    @functools.cached_property
    def lower(self) -> Tensor:
        """L with L L^T = the damped moments."""
        return torch.linalg.cholesky(self.damped)

    @functools.cached_property
    def upper(self) -> Tensor:
        """U, float32, with U^T U = the inverse: row j says how later columns make up for j."""
        return torch.linalg.cholesky(torch.cholesky_inverse(self.lower), upper=True).float()

    @functools.cached_property
    def importance(self) -> Tensor:
        """float32 [K]: how much an error in each column counts on its own."""
        return self.damped.diagonal().float()


def retarget(weight: Tensor, curvature: Curvature, cross: Tensor, share: float) -> Tensor:
    """The weight [N, K] that makes up for a `share` of what its inputs have changed.

    cross = E[x xq^T], [K, K]: xq the inputs in the quantized model, whose curvature is given, x
    those of the same tokens in the original one. At share 1 this is the least-squares solution
    for the original outputs W x from inputs xq, which follows the calibration text too closely.
    """
    if share == 0:
        return weight
    difference = weight.double() @ (cross.double() - curvature.moments)
    change = torch.cholesky_solve(difference.T, curvature.lower).T
    return (weight.double() + share * change).float()


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


def gptq(
    weight: Tensor,
    curvature: Curvature,
    parts: Sequence[tuple[Format, int]],
    compensate: Callable[[Tensor, Tensor, Tensor, Format], Group] = compensate_group,
) -> list[Quantized]:
    """Round weight [N, K] with error compensation, for inputs of this curvature.

    `parts` are formats with numbers of columns, K in all: one `Quantized` for each. A group's
    scale is fixed when its first column is reached, by search weighted with the moments'
    diagonal. `compensate` is `compensate_group`, or something faster that equals it.
    """
    left = weight.float().clone()
    results, start = [], 0
    for fmt, columns in parts:
        stop = start + columns
        groups: list[Group] = []
        for first in range(start, stop, _BLOCK):
            groups += _gptq_block(
                left, curvature, fmt, first, min(first + _BLOCK, stop), compensate
            )
        codes = torch.cat([group.codes for group in groups], 1)
        scale = torch.cat([group.scale for group in groups], 1)
        zeros = [group.zero_point for group in groups if group.zero_point is not None]
        results.append(Quantized(codes, scale, torch.cat(zeros, 1) if zeros else None))
        start = stop
    return results


def _gptq_block(
    left: Tensor,
    curvature: Curvature,
    fmt: Format,
    start: int,
    stop: int,
    compensate: Callable[[Tensor, Tensor, Tensor, Format], Group],
) -> list[Group]:
    """Round the columns start..stop of `left` in one format, and push their errors to the right.

    Those beyond `stop` are touched once for the whole block, as they are many.
    """
    factor, importance = curvature.upper, curvature.importance
    groups = []
    for first in range(start, stop, fmt.group_size):
        last = min(first + fmt.group_size, stop)
        columns = slice(first, last)
        groups.append(
            compensate(left[:, columns], factor[columns, columns], importance[columns], fmt)
        )
        left[:, last:stop] -= groups[-1].errors @ factor[columns, last:stop]
    left[:, stop:] -= torch.cat([group.errors for group in groups], 1) @ factor[start:stop, stop:]
    return groups
