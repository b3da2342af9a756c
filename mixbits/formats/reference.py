"""The slow, plain-torch definition of every operation; the kernels must equal it.

Nothing here is tuned. It is written to be read, and to be compared with: fake-quantization,
codes and packing of every other backend equal these bit for bit.

The scale of an MX block of maximum m is 2^E, stored as the byte E + 127. With m = f * 2^e,
1 <= f < 2, and the element's largest value fmax * 2^emax:

    floor   E = e - emax                      OCP MX v1.0; values above the element's maximum clamp
    rceil   E = e - emax + (f > fmax)         the smallest E with m <= max_value * 2^E
    even    E = e - emax + (f >= 1.75)        compressed-tensors' rule, for 4 and 8 bits alike

and E is clamped to -127 at the lower end. The exponent is read from the bits of the float, so
that there is no logarithm to go wrong one ulp below a power of two. A block of zeros has the
byte 0. A block that holds a NaN or an infinity has the byte 255 (e8m0's NaN) and is NaN as a
whole; an integer group with one has a NaN scale. Nothing non-finite is ever packed silently:
`mixbits.rounding.nearest.pack_weight` refuses it by name.

Elements are rounded to nearest, ties to even, and clamped to the largest finite value. Zeros
keep their sign.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .schemes import INTEGERS, MINIFLOATS, MX_GROUP, Format, Minifloat

MIN_INT_SCALE = 1e-5  # AutoRound's q_scale_thresh, rounded to float16 on use


class Quantized(NamedTuple):
    """`codes` uint8 [..., K]; `scale` [..., groups] uint8 (e8m0) or float16; `zero_point` uint8."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None


def split_groups(x: Tensor, group_size: int) -> Tensor:
    """x [..., K] as float32 [..., groups, group_size]; a short last group is filled with zeros."""
    pad = -x.shape[-1] % group_size
    padded = torch.nn.functional.pad(x.float(), (0, pad))
    return padded.unflatten(-1, (padded.shape[-1] // group_size, group_size))


def join_groups(grouped: Tensor, columns: int) -> Tensor:
    return grouped.flatten(-2)[..., :columns]


# --- MX --------------------------------------------------------------------------------------


def e8m0_to_float(byte: Tensor) -> Tensor:
    """uint8 e8m0 -> float32: 2^(byte - 127); 0 is the subnormal 2^-127, 255 is NaN."""
    bits = byte.int() << 23
    bits = torch.where(byte == 0, torch.full_like(bits, 0x00400000), bits)
    return torch.where(byte == 255, torch.full_like(bits, 0x7FC00000), bits).view(torch.float32)


def mx_scale(block_max: Tensor, fmt: Format) -> Tensor:
    """The e8m0 byte of blocks whose largest magnitudes are `block_max` (float32 >= 0)."""
    element = MINIFLOATS[fmt.element]
    bits = block_max.float().contiguous().view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    if fmt.scale_mode == "rceil":
        top = int(torch.tensor(element.max_value).view(torch.int32).item()) & 0x7FFFFF
        round_up = mantissa > top
    else:
        round_up = mantissa >= 0x600000 if fmt.scale_mode == "even" else torch.zeros_like(bits)
    byte = (exponent - element.max_exponent + round_up.int()).clamp(min=0)
    return torch.where(exponent == 255, torch.full_like(byte, 255), byte).to(torch.uint8)


def _exponent(y: Tensor, element: Minifloat) -> Tensor:
    """int32 floor(log2|y|), not below that of the element's smallest normal number."""
    _, exponent = torch.frexp(y)  # y = m * 2^exponent, 0.5 <= |m| < 1, and 0 = 0 * 2^0
    lowest = torch.full_like(exponent, element.min_exponent)
    return torch.where(y == 0, lowest, torch.maximum(exponent - 1, lowest))


def round_minifloat(y: Tensor, element: Minifloat) -> Tensor:
    """float32 -> float32 on the element's grid: nearest, ties to even, saturating."""
    exponent = _exponent(y, element)
    step = torch.ldexp(torch.ones_like(y), exponent - element.mantissa_bits)
    rounded = torch.round(y / step) * step
    return rounded.clamp(-element.max_value, element.max_value)


def minifloat_encode(values: Tensor, element: Minifloat) -> Tensor:
    """Values on the element's grid (float32) -> codes uint8: sign, exponent, mantissa."""
    exponent = _exponent(values, element)
    mantissa = torch.ldexp(values.abs(), element.mantissa_bits - exponent).int()
    # A normal number carries its leading one into the exponent field, which therefore counts
    # from 0 for subnormals (no leading one) and normals of the lowest exponent alike.
    magnitude = ((exponent - element.min_exponent) << element.mantissa_bits) + mantissa
    sign = torch.signbit(values).int() << (element.bits - 1)
    return (sign | magnitude).to(torch.uint8)


def minifloat_decode(codes: Tensor, element: Minifloat) -> Tensor:
    """Codes uint8 -> float32. Codes that are NaN or infinity in e4m3/e5m2 decode to NaN."""
    magnitude = codes.int() & ((1 << (element.bits - 1)) - 1)
    field = magnitude >> element.mantissa_bits
    mantissa = magnitude & ((1 << element.mantissa_bits) - 1)
    normal = (field > 0).int()
    mantissa = mantissa + (normal << element.mantissa_bits)
    exponent = field - normal + element.min_exponent - element.mantissa_bits
    values = torch.ldexp(mantissa.float(), exponent)
    values = torch.where(values > element.max_value, torch.full_like(values, torch.nan), values)
    return torch.where(codes >> (element.bits - 1) > 0, -values, values)


def _mx_scales(grouped: Tensor, fmt: Format) -> Tensor:
    # The largest bit pattern is the largest magnitude, and NaN and Inf are above all numbers.
    magnitude_bits = grouped.abs().contiguous().view(torch.int32)
    return mx_scale(magnitude_bits.amax(-1).view(torch.float32), fmt)


def _mx_codes(grouped: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    element = MINIFLOATS[fmt.element]
    y = grouped / e8m0_to_float(scale).unsqueeze(-1)
    rounded = round_minifloat(torch.nan_to_num(y), element)  # NaN blocks: codes are don't-cares
    rounded = torch.where(torch.isnan(y), torch.zeros_like(rounded), rounded)
    return minifloat_encode(rounded, element)


# --- integers --------------------------------------------------------------------------------


def _int_scales(grouped: Tensor, fmt: Format) -> tuple[Tensor, Tensor | None]:
    """AutoRound's `int_sym` and `int_asym`, computed in float32 with a float16 scale."""
    bits = INTEGERS[fmt.element]
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    floor = torch.tensor(MIN_INT_SCALE, dtype=torch.float16).item()
    zero_point = None
    if fmt.symmetric:
        # The side of larger magnitude maps to the lowest code, so the scale may be negative.
        half = 1 << (bits - 1)
        scale = (torch.where(high < -low, -low, -high) / half).half().float()
        scale = torch.where(scale < 0, scale.clamp(max=-floor), scale.clamp(min=floor))
    else:
        scale = ((high - low) / ((1 << bits) - 1)).half().float().clamp(min=floor)
        zero_point = torch.round(-low / scale).clamp(0, (1 << bits) - 1)
    finite = torch.isfinite(grouped).all(-1) & torch.isfinite(scale)
    scale = torch.where(finite, scale, torch.full_like(scale, torch.nan)).half()
    if zero_point is not None:
        zero_point = torch.where(finite, zero_point, torch.zeros_like(zero_point)).to(torch.uint8)
    return scale, zero_point


def _int_codes(grouped: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: Format) -> Tensor:
    bits = INTEGERS[fmt.element]
    offset = 1 << (bits - 1) if zero_point is None else zero_point.float().unsqueeze(-1)
    codes = torch.round(grouped / scale.float().unsqueeze(-1)) + offset
    return torch.nan_to_num(codes).clamp(0, (1 << bits) - 1).to(torch.uint8)


# --- both ------------------------------------------------------------------------------------


def scales(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point [..., groups] of x [..., K] in `fmt`, as in `Quantized`."""
    grouped = split_groups(x, fmt.group_size)
    return (_mx_scales(grouped, fmt), None) if fmt.is_mx else _int_scales(grouped, fmt)


def encode(x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: Format) -> Tensor:
    """Codes uint8 [..., K]: x rounded to nearest with given scales, which need not be its own."""
    grouped = split_groups(x, fmt.group_size)
    if fmt.is_mx:
        codes = _mx_codes(grouped, scale, fmt)
    else:
        codes = _int_codes(grouped, scale, zero_point, fmt)
    return join_groups(codes, x.shape[-1])


def quantize(x: Tensor, fmt: Format) -> Quantized:
    """Round x [..., K] (any float dtype; computed in float32) to codes and scales."""
    scale, zero_point = scales(x, fmt)
    return Quantized(encode(x, scale, zero_point, fmt), scale, zero_point)


def dequantize(q: Quantized, fmt: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values [..., K] that codes and scales stand for, in `dtype`."""
    columns = q.codes.shape[-1]
    if fmt.is_mx:
        values = minifloat_decode(q.codes, MINIFLOATS[fmt.element])
        scale = e8m0_to_float(q.scale)
    else:
        half = 1 << (INTEGERS[fmt.element] - 1)
        offset = half if q.zero_point is None else q.zero_point.float()
        grouped = split_groups(q.codes, fmt.group_size)
        values = grouped - (offset if isinstance(offset, int) else offset.unsqueeze(-1))
        values = join_groups(values, columns)
        scale = q.scale.float()
    return join_groups(split_groups(values, fmt.group_size) * scale.unsqueeze(-1), columns).to(
        dtype
    )


def fake_quantize(x: Tensor, fmt: Format) -> Tensor:
    """Round trip of x [..., K] through codes, in x's own dtype."""
    return dequantize(quantize(x, fmt), fmt, x.dtype)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., K] -> bytes [..., ceil(K * bits / 8)], first code in the lowest bits."""
    per_byte = 8 // bits
    pad = -codes.shape[-1] % per_byte
    padded = torch.nn.functional.pad(codes, (0, pad)).unflatten(-1, (-1, per_byte))
    shifts = torch.arange(per_byte, device=codes.device) * bits
    return (padded.int() << shifts).sum(-1).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack_codes`; `columns` is K."""
    shifts = torch.arange(8 // bits, device=packed.device) * bits
    codes = (packed.int().unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :columns].to(torch.uint8)


def matmul(x: Tensor, weight: Quantized, fmt: Format, activation: Format | None = None) -> Tensor:
    """x [M, K] times the dequantized weight [N, K] transposed, in float32, in x's dtype.

    With `activation`, x is fake-quantized to it first.
    """
    if activation is not None:
        x = fake_quantize(x, activation)
    return (x.float() @ dequantize(weight, fmt).T).to(x.dtype)


# --- sensitivity statistics ------------------------------------------------------------------


def _slab_sums(per_element: Tensor) -> Tensor:
    """float64 [N, K] -> [slabs], summed over rows and over each slab of 32 columns."""
    pad = -per_element.shape[-1] % MX_GROUP
    columns = torch.nn.functional.pad(per_element.sum(0), (0, pad))
    return columns.unflatten(0, (-1, MX_GROUP)).sum(-1)


def fisher_statistics(
    weight: Tensor, row_weight: Tensor, column_weight: Tensor, formats: Sequence[Format]
) -> Tensor:
    """float64 [formats, slabs]: sum over a slab of row_weight_o column_weight_k (W - Q(W))_ok^2.

    weight [N, K], row_weight [N], column_weight [K]; Q is fake-quantization in float32.
    """
    out = []
    for fmt in formats:
        error = weight.double() - fake_quantize(weight.float(), fmt).double()
        out.append(_slab_sums(row_weight.double()[:, None] * column_weight.double() * error**2))
    return torch.stack(out)


def gradient_statistics(weight: Tensor, gradient: Tensor, formats: Sequence[Format]) -> Tensor:
    """float64 [formats, slabs]: sum over a slab of |g_ok (W - Q(W))_ok|; gradient is [N, K]."""
    out = []
    for fmt in formats:
        error = weight.double() - fake_quantize(weight.float(), fmt).double()
        out.append(_slab_sums((gradient.double() * error).abs()))
    return torch.stack(out)


def square_sums(
    x: Tensor,
    formats: Sequence[Format],
    rounding: Callable[[Tensor, Format], Tensor] = fake_quantize,
) -> Tensor:
    """float64 [1 + formats, K]: sums over rows of x_tk^2, and of (x - Q(x))_tk^2 per format.

    x is [T, K]; `rounding` is Q, on float32. Squares are float32, their sums float64.
    """
    wide = x.float()
    parts = [wide, *(wide - rounding(wide, fmt) for fmt in formats)]
    return torch.stack([part.square().sum(0, dtype=torch.float64) for part in parts])
