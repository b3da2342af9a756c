"""MXFP4 weights as 8-bit floats, for products with activations in 8-bit floats: the definition.

e2m1 times 2^k is a number of e4m3 for k = -8 .. 6. So a row of a weight whose block scales lie
within 15 binades equals a row of e4m3 codes times one power of two, without any rounding, and the
matrix units of Hopper multiply 8-bit floats at twice the rate of 16-bit ones. What is rounded are
the activations, to e4m3 with one scale per token: the mode must be asked for.

A block of zeros fits any row. A NaN scale fits none, for what it makes of x is not a number either.
e4m3 weights (MXFP8) are left out: their codes use all binades that e4m3 has, so that next to no
block has room for a second scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .pack import Packed
from .schemes import MINIFLOATS, Format

LOWEST, HIGHEST = -8, 6  # k
NAN_SCALE = 255
SMALLEST_TOKEN = 2.0**-100  # the largest magnitude of a token counts as at least this


def can_fold(fmt: Format) -> bool:
    """Whether weights in `fmt` may be ones of e4m3: MXFP4, whatever rule makes its scales."""
    return fmt.element == "e2m1" and fmt.scale == "e8m0"


def fold_rows(packed: Packed) -> Tensor | None:
    """The scales uint8 (e8m0) [N] of a packed e2m1 weight's rows, or None if a row does not fit.

    Waits for the device once: not for the inside of a product.
    """
    codes, scale = packed.weight_packed, packed.weight_scale
    rows, groups = scale.shape
    padded = torch.nn.functional.pad(codes, (0, groups * 16 - codes.shape[1]))
    is_zero = (padded.view(rows, groups, 16) & 0x77 == 0).all(-1)  # of either sign
    highest = scale.masked_fill(is_zero, 0).int().amax(1)
    lowest = scale.masked_fill(is_zero, NAN_SCALE).int().amin(1)
    fits = (highest - lowest <= HIGHEST - LOWEST) & (scale != NAN_SCALE).all(1)
    if not bool(fits.all()):
        return None
    # Not below 1, so that the scale is a normal float32.
    return (highest - HIGHEST).clamp_min(1).to(torch.uint8)


def folded(packed: Packed, row_scale: Tensor, in_features: int) -> Tensor:
    """The float8_e4m3fn [N, K] that times its rows' scales is the weight; NaN where it is not."""
    codes = reference.unpack_codes(packed.weight_packed, 4, in_features)
    values = reference.minifloat_decode(codes, MINIFLOATS["e2m1"])
    binades = packed.weight_scale.int() - row_scale.int()[:, None]
    factors = torch.ldexp(torch.ones_like(binades, dtype=torch.float32), binades)
    exact = values * factors.repeat_interleave(32, 1)[:, :in_features]
    exact = torch.where(values == 0, values, exact)  # also where the factor is infinite
    rounded = exact.to(torch.float8_e4m3fn)
    is_exact = rounded.float() == exact
    return torch.where(is_exact, exact, torch.nan).to(torch.float8_e4m3fn)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes float8_e4m3fn [M, K], scale float32 [M]: x is about codes * scale.

    A token's largest magnitude becomes 448, e4m3's largest number. A token that holds a NaN or an
    infinity has the scale NaN.
    """
    x = x.float()
    largest = x.abs().amax(1, keepdim=True)
    finite = torch.where(largest.isfinite(), largest, torch.nan).clamp_min(SMALLEST_TOKEN)
    most = torch.full_like(finite, 448.0)  # by a number torch would divide as it likes
    codes = (x * (most / finite)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return codes, (finite / most).flatten()


def matmul(x: Tensor, packed: Packed, row_scale: Tensor) -> Tensor:
    """x [M, K], rounded by `quantize_tokens`, times packed [N, K] -> [M, N] in x's dtype."""
    codes, scale = quantize_tokens(x)
    sums = codes.float() @ folded(packed, row_scale, x.shape[1]).float().T
    return (sums * reference.e8m0_to_float(row_scale) * scale[:, None]).to(x.dtype)
