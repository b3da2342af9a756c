"""Weights that lie outside of what the scales of a format can be: refused, where it does harm.

A scale is a float16 of at least 1e-5 (integers; AutoRound's floor), a power of two from 2^-127
(MX), that of a maximum of 2^-100 (FP8), or 2^-9 of a tensor's own (NVFP4). A group that needs
a smaller one is rounded in steps that are too coarse for it, in the end to zeros, though nothing
overflows and nothing is NaN. How much that matters is judged by rounding the same group again,
multiplied by a power of two that takes it to where scales are no limit:

    a group is *lost*     if its squared error is more than WORSE times what it is there
    a weight is refused   if more than MANY of its groups are lost (those of zeros not counted), or
                          if they add more than HARM to the squared error that it would have

So groups of zeros pass, and so do a few that are negligible beside the others. Too large weights
are refused wherever there is one: it would be infinite, or NaN.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UsageError
from .pack import Packed, unpack
from .reference import (
    MIN_INT_SCALE,
    MIN_MAXIMUM,
    Quantized,
    dequantize,
    encode,
    quantize,
    split_groups,
)
from .schemes import MINIFLOATS, Format, Scheme

WORSE = 2.0
MANY = 1 / 8
HARM = 1 / 2

_LEAST = {
    "e8m0": "2^-127",
    "float16": f"{MIN_INT_SCALE:g}, within float16",
    "float32": "those of rows up to 2^-100",
}
logger = logging.getLogger("mixbits")


def _errors(x: Tensor, q: Quantized, fmt: Format) -> Tensor:
    """float64 [N, groups]: squared error of x [N, K], rounded to nearest with the scales of `q`."""
    rounded = dequantize(Quantized(encode(x, q.scales, fmt), *q.scales), fmt)
    squares = (rounded.double() - x.double()).square()  # of 2^-127 and less, beyond float32
    group_size = fmt.group_size or x.shape[-1]
    padded = torch.nn.functional.pad(squares, (0, -x.shape[-1] % group_size))
    return padded.unflatten(-1, (-1, group_size)).sum(-1)


def _errors_elsewhere(x: Tensor, fmt: Format) -> Tensor:
    """As `_errors`, where scales are no limit: of groups x [N, group_size], scaled and back."""
    wide = x.double()
    exponent = torch.frexp(wide.abs().amax(-1, keepdim=True))[1].double()
    near_one = torch.ldexp(wide, -exponent).float()
    return torch.ldexp(_errors(near_one, quantize(near_one, fmt), fmt), 2 * exponent)


def _low(scale: Tensor, fmt: Format) -> Tensor:
    """Whether a scale [N, groups] may be larger than its group needs."""
    if fmt.scale in ("e8m0", "e4m3"):
        return scale <= 1  # of the lowest byte, and one more, a search takes the better
    if fmt.scale == "float32":
        return scale <= MIN_MAXIMUM  # scales of such maxima are smaller still
    floor = torch.tensor(MIN_INT_SCALE, dtype=torch.float16, device=scale.device)
    return scale.abs() <= floor


class ScaleError(UsageError):
    """A format's scales cannot hold a weight, however it is rounded."""


class _Loss(NamedTuple):
    """Of groups [N, groups]: largest magnitude, squared error, and what it would be elsewhere."""

    largest: Tensor
    found: Tensor
    due: Tensor

    @property
    def lost(self) -> Tensor:
        return self.found > WORSE * self.due


def _loss(weight: Tensor, fmt: Format, packed: Packed) -> _Loss | None:
    """What small groups of weight [N, K] lose to their scales; None where none is that small."""
    low = _low(packed.weight_scale, fmt)
    if not low.any():
        return None
    weight = weight.float()
    grouped = split_groups(weight, fmt.group_size)
    largest = grouped.abs().amax(-1)
    low &= largest > 0
    if not low.any():
        return None
    found = _errors(weight, unpack(packed, fmt, weight.shape[1]), fmt)
    due = found.clone()
    due[low] = _errors_elsewhere(grouped[low], fmt).squeeze(-1)
    return _Loss(largest, found, due)


def lost_groups(weight: Tensor, fmt: Format, packed: Packed) -> int:
    """How many groups of weight [N, K] are too small for their scales, and lose their digits."""
    loss = _loss(weight, fmt, packed)
    return 0 if loss is None else int(loss.lost.sum())


def check_scales(name: str, weight: Tensor, scheme: Scheme, packed: Packed) -> None:
    """Raise ScaleError that names the tensor where its scales cannot hold weight [N, K].

    Of NVFP4, whose scales reach no further below the largest of the tensor than they do, lost
    groups are warned of instead.
    """
    fmt = scheme.format
    _check_high(name, weight, scheme, packed)
    loss = _loss(weight, fmt, packed)
    if loss is None:
        return
    (largest, found, due), lost = loss, loss.lost
    if fmt.scale == "e4m3":
        if lost.any():
            logger.warning(
                "%s: %d of %d groups are too small beside the largest weight for %s, and lose "
                "their digits",
                name,
                int(lost.sum()),
                lost.numel(),
                scheme.name,
            )
        return
    many = int(lost.sum()) > MANY * int((largest > 0).sum())
    if many or float((found - due)[lost].sum()) > HARM * float(due.sum()):
        least = _LEAST[fmt.scale]
        raise ScaleError(
            f"{scheme.name} needs group scales of at least {least}: got {int(lost.sum())} of "
            f"{largest.numel()} groups of smaller weights, up to {float(largest[lost].max()):.3g}, "
            f"that would lose their digits ({name})"
        )


def _check_high(name: str, weight: Tensor, scheme: Scheme, packed: Packed) -> None:
    fmt, scale = scheme.format, packed.weight_scale
    if fmt.scale not in ("e8m0", "float16"):
        return  # the largest values are the largest weights, but for rounding
    is_mx = fmt.scale == "e8m0"
    limit = "float32" if is_mx else "float16"
    top = MINIFLOATS[fmt.element].max_exponent if fmt.is_float else 0
    if is_mx and not (scale >= 254 - top).any():
        return  # the largest values are within float32
    held = dequantize(unpack(packed, fmt, weight.shape[1]), fmt) if is_mx else scale
    if not torch.isfinite(held).all():
        what = "rounded weights" if is_mx else "group scales"
        raise ScaleError(
            f"{scheme.name} needs {what} within {limit}: got weights up to "
            f"{weight.abs().max().item():.4g} ({name})"
        )
