"""Choose codes better than rounding each weight to the nearest does, within the same formats.

search  Every group takes, of a few scales, that of least squared error. With an MX block these
        are the power of two of the OCP rule and the next larger one; with integers the group's
        range and fractions of it.

gptq    Columns are rounded one after the other, and each one's error is made up for by the
        columns still to come, as well as the inputs' second moments allow (GPTQ, Frantar et al.,
        arXiv 2210.17323; the order of columns is that of the linear). The second moments are of
        the inputs as they arrive in the quantized model, rounded activations and all, and a share
        of the difference to the original model's inputs is made up for as well: the *correction*
        (`corrected`).

Everything here is exact torch in float32 and float64, on any device, one linear at a time;
`mixbits.ops.compensate_group` is the same, to the bit, as native code for CPUs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..formats.compensate import Group, compensate_group, search_scales, search_tensor_scale
from ..formats.reference import Quantized, Scales
from ..formats.schemes import ROW, Format

DAMPING = 0.01  # of the mean of the diagonal, added to second moments (GPTQ's percdamp), or more
_BLOCK = 128  # columns, a multiple of every group size


# --- error compensation ----------------------------------------------------------------------


class Curvature:
    """Second moments E[xq xq^T] [K, K] of a linear's inputs, and what is made of them once.

    In float64, and damped: to be safe to invert, and the more the fewer `tokens` they are a mean
    over, since what K columns of so few seem to have in common, other text has not. The share of
    the diagonal's mean is K / tokens, which is what sampling adds to small eigenvalues, or
    DAMPING. An input that is always 0 counts as 1.
    """

    def __init__(self, moments: Tensor, tokens: float = math.inf) -> None:
        self.moments = moments.double()
        self.damped = self.moments.clone()
        diagonal = self.damped.diagonal()
        diagonal += max(DAMPING, len(moments) / tokens) * diagonal.mean()
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


def corrected(weight: Tensor, curvature: Curvature, cross: Tensor, correction: float) -> Tensor:
    """The weight [N, K] that makes up for a share, `correction`, of its inputs' changes.

    cross = E[x xq^T], [K, K]: xq the inputs in the quantized model, whose curvature is given, x
    those of the same tokens in the original one. At 1 this is the least-squares solution
    for the original outputs W x from inputs xq, which follows the calibration text too closely.
    """
    if correction == 0:
        return weight
    difference = weight.double() @ (cross.double() - curvature.moments)
    change = torch.cholesky_solve(difference.T, curvature.lower).T
    return (weight.double() + correction * change).float()


def gptq(
    weight: Tensor,
    curvature: Curvature,
    parts: Sequence[tuple[Format, int]],
    compensate: Callable[..., Group] = compensate_group,
) -> list[Quantized]:
    """Round weight [N, K] with error compensation, for inputs of this curvature.

    `parts` are formats with numbers of columns, K in all: one `Quantized` for each. A group's
    scale is fixed when its first column is reached, by search weighted with the moments'
    diagonal; those of a tensor or a row, before. `compensate` is `compensate_group`, or something
    faster that equals it.
    """
    left = weight.float().clone()
    results, start = [], 0
    for fmt, columns in parts:
        stop = start + columns
        piece, importance = left[:, start:stop], curvature.importance[start:stop]
        divisor = search_tensor_scale(piece, fmt)
        known = search_scales(piece, fmt, importance) if fmt.group_size == ROW else None
        one = functools.partial(compensate, fmt=fmt, divisor=divisor, known=known)
        groups: list[Group] = []
        for first in range(start, stop, _BLOCK):
            last = min(first + _BLOCK, stop)
            groups += _gptq_block(left, curvature, fmt.group_size or _BLOCK, first, last, one)
        results.append(_joined(groups, divisor, known))
        start = stop
    return results


def _joined(groups: Sequence[Group], divisor: Tensor | None, known: Scales | None) -> Quantized:
    codes = torch.cat([group.codes for group in groups], 1)
    if known is not None:
        return Quantized(codes, *known)
    scale = torch.cat([group.scale for group in groups], 1)
    zeros = [group.zero_point for group in groups if group.zero_point is not None]
    return Quantized(codes, scale, torch.cat(zeros, 1) if zeros else None, divisor)


def _gptq_block(
    left: Tensor,
    curvature: Curvature,
    group_size: int,
    start: int,
    stop: int,
    compensate: Callable[[Tensor, Tensor, Tensor], Group],
) -> list[Group]:
    """Round the columns start..stop of `left` in one format, and push their errors to the right.

    Those beyond `stop` are touched once for the whole block, as they are many.
    """
    factor, importance = curvature.upper, curvature.importance
    groups = []
    for first in range(start, stop, group_size):
        last = min(first + group_size, stop)
        columns = slice(first, last)
        groups.append(compensate(left[:, columns], factor[columns, columns], importance[columns]))
        left[:, last:stop] -= groups[-1].errors @ factor[columns, last:stop]
    left[:, stop:] -= torch.cat([group.errors for group in groups], 1) @ factor[start:stop, stop:]
    return groups
