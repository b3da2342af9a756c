"""The slow, plain-torch definition of every operation; the kernels must equal it.

Nothing here is tuned. It is written to be read, and to be compared with: fake-quantization,
codes and packing of every other backend equal these bit for bit.

The scale of an MX block of maximum m is 2^E, stored as the byte E + 127. With m = f * 2^e,
1 <= f < 2, and the element's largest value fmax * 2^emax (of int8, whose codes count 2^-6 each,
that is 127/64):

    floor   E = e - emax                      OCP MX v1.0; values above the element's maximum clamp
    rceil   E = e - emax + (f > fmax)         the smallest E with m <= max_value * 2^E
    even    E = e - emax + (f >= 1.75)        compressed-tensors' rule, for all its bits alike; of
                                              int8 (f >= 127.5/64): what would round beyond 127

and E is clamped to -127 at the lower end. The exponent is read from the bits of the float, so
that there is no logarithm to go wrong one ulp below a power of two. A block of zeros has the
byte 0. A block that holds a NaN or an infinity has the byte 255 (e8m0's NaN) and is NaN as a
whole; a group of any other scale with one has a NaN scale. Nothing non-finite is ever packed
silently: `mixbits.rounding.nearest.pack_weight` refuses it by name.

The scale of an NVFP4 block is m / 6 * G rounded to e4m3, at least its smallest number above 0;
the values are code * (scale / G), where G = 448 * 6 / (the largest magnitude of the tensor, or of
the row). Scales in float32 are m / 448 for e4m3 and m / 127.5 for int8. A maximum below 2^-100
counts as that.

Elements are rounded to nearest, ties to even, and clamped to the largest finite value. Zeros
keep their sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .schemes import INTEGERS, MINIFLOATS, MX_GROUP, PLANES, ROW, Format, Minifloat

MIN_INT_SCALE = 1e-5  # AutoRound's q_scale_thresh, rounded to float16 on use
MIN_MAXIMUM = 2.0**-100  # of a row or tensor, where scales in float32 follow from it
INT8_UNIT = 2.0**-6  # of OCP's INT8: what its codes count


class Scales(NamedTuple):
    """What groups of codes are multiplied by, and counted from.

    scale         [..., groups]: uint8 (the bits of e8m0 or e4m3), float16 or float32
    zero_point    uint8 [..., groups] of asymmetric formats
    tensor_scale  float32 [1], or [..., 1] of a row each: what scales in e4m3 are divided by
    """

    scale: Tensor
    zero_point: Tensor | None = None
    tensor_scale: Tensor | None = None


class Quantized(NamedTuple):
    """`codes` uint8 [..., K], and their `Scales`, field by field."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    tensor_scale: Tensor | None = None

    @property
    def scales(self) -> Scales:
        return Scales(*self[1:])


def split_groups(x: Tensor, group_size: int) -> Tensor:
    """x [..., K] as float32 [..., groups, group_size]; a short last group is filled with zeros."""
    if group_size == ROW:
        return x.float().unsqueeze(-2)
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
    largest = MINIFLOATS[fmt.element].max_value if fmt.is_float else 127 * INT8_UNIT
    bits = block_max.float().contiguous().view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    if fmt.scale_mode == "rceil":
        top = int(torch.tensor(largest).view(torch.int32).item()) & 0x7FFFFF
        round_up = mantissa > top
    else:
        even = mantissa >= (0x600000 if fmt.is_float else 0x7F0000)  # 1.75, or 127.5 / 64
        round_up = even if fmt.scale_mode == "even" else torch.zeros_like(bits)
    max_exponent = math.frexp(largest)[1] - 1
    byte = (exponent - max_exponent + round_up.int()).clamp(min=0)
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


# --- scales in e4m3 and in float32 --------------------------------------------------------------


def _maxima(grouped: Tensor) -> Tensor:
    """Largest magnitudes [..., groups] of x [..., groups, group]; NaN where one is not finite."""
    finite = torch.isfinite(grouped)
    largest = torch.where(finite, grouped, 0.0).abs().amax(-1)
    return torch.where(finite.all(-1), largest, torch.nan)


def divisor_of(maximum: Tensor, fmt: Format, largest_scale: float = 448.0) -> Tensor:
    """What scales are divided by, of values whose largest finite magnitude is `maximum`."""
    top = torch.full_like(maximum, largest_scale * MINIFLOATS[fmt.element].max_value)
    return top / maximum.clamp_min(MIN_MAXIMUM)


def tensor_scale(x: Tensor, fmt: Format, largest_scale: float = 448.0) -> Tensor:
    """G, float32 [1] or [..., 1], of x [..., K]: scales times G are at most `largest_scale`."""
    maximum = torch.where(torch.isfinite(x), x, 0.0).float().abs()
    if fmt.tensor_scale == "row":
        maximum = maximum.amax(-1, keepdim=True)
    else:
        maximum = maximum.amax().reshape(1)
    return divisor_of(maximum, fmt, largest_scale)


def nv_scale(block_max: Tensor, divisor: Tensor, fmt: Format) -> Tensor:
    """The e4m3 byte of blocks of maxima [..., groups], NaN among them, for a tensor's scale."""
    e4m3 = MINIFLOATS["e4m3"]
    wanted = block_max / MINIFLOATS[fmt.element].max_value * divisor
    rounded = round_minifloat(torch.nan_to_num(wanted), e4m3).clamp_min(2.0**-9)
    byte = minifloat_encode(rounded, e4m3)
    return torch.where(torch.isnan(wanted), torch.full_like(byte, 0x7F), byte)


def row_scale(maximum: Tensor, fmt: Format) -> Tensor:
    """float32: the maximum becomes the largest code; compressed-tensors' rule."""
    top = MINIFLOATS[fmt.element].max_value if fmt.is_float else (2**fmt.bits - 1) / 2
    # By a tensor: by a number torch would divide as it likes.
    return maximum.clamp_min(MIN_MAXIMUM) / torch.full_like(maximum, top)


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


# --- all -------------------------------------------------------------------------------------


def scales(x: Tensor, fmt: Format, divisor: Tensor | None = None) -> Scales:
    """The scales of x [..., K] in `fmt`; a tensor's scale may be given, as by `tensor_scale`."""
    grouped = split_groups(x, fmt.group_size)
    if fmt.scale == "e8m0":
        return Scales(_mx_scales(grouped, fmt))
    if fmt.scale == "float16":
        return Scales(*_int_scales(grouped, fmt))
    if fmt.scale == "float32":
        return Scales(row_scale(_maxima(grouped), fmt))
    divisor = tensor_scale(x, fmt) if divisor is None else divisor
    return Scales(nv_scale(_maxima(grouped), divisor, fmt), None, divisor)


def factors(scales: Scales, fmt: Format) -> Tensor:
    """float32 [..., groups]: what decoded codes are multiplied by."""
    if fmt.scale == "e8m0":
        factor = e8m0_to_float(scales.scale)
        return factor if fmt.is_float else factor * INT8_UNIT
    if fmt.scale == "e4m3":
        assert scales.tensor_scale is not None
        return minifloat_decode(scales.scale, MINIFLOATS["e4m3"]) / scales.tensor_scale
    return scales.scale.float()


def offsets(scales: Scales, fmt: Format) -> Tensor:
    """float32 [..., groups]: what integer codes are counted from."""
    if scales.zero_point is not None:
        return scales.zero_point.float()
    return torch.full_like(scales.scale, 1 << (fmt.bits - 1), dtype=torch.float32)


def round_codes(y: Tensor, offset: Tensor, fmt: Format) -> Tensor:
    """float32 -> codes uint8 of y = x / factor, rounded to nearest; of NaN they mean nothing."""
    if fmt.is_float:
        element = MINIFLOATS[fmt.element]
        rounded = round_minifloat(torch.nan_to_num(y), element)
        rounded = torch.where(torch.isnan(y), torch.zeros_like(rounded), rounded)
        return minifloat_encode(rounded, element)
    codes = torch.round(y) + offset
    return torch.nan_to_num(codes).clamp(0, (1 << fmt.bits) - 1).to(torch.uint8)


def encode(x: Tensor, scales: Scales, fmt: Format) -> Tensor:
    """Codes uint8 [..., K]: x rounded to nearest with given scales, which need not be its own."""
    y = split_groups(x, fmt.group_size) / factors(scales, fmt).unsqueeze(-1)
    return join_groups(round_codes(y, offsets(scales, fmt).unsqueeze(-1), fmt), x.shape[-1])


def quantize(x: Tensor, fmt: Format) -> Quantized:
    """Round x [..., K] (any float dtype; computed in float32) to codes and scales."""
    found = scales(x, fmt)
    return Quantized(encode(x, found, fmt), *found)


def dequantize(q: Quantized, fmt: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values [..., K] that codes and scales stand for, in `dtype`."""
    columns = q.codes.shape[-1]
    if fmt.is_float:
        values = split_groups(minifloat_decode(q.codes, MINIFLOATS[fmt.element]), fmt.group_size)
    else:
        values = split_groups(q.codes, fmt.group_size) - offsets(q.scales, fmt).unsqueeze(-1)
    return join_groups(values * factors(q.scales, fmt).unsqueeze(-1), columns).to(dtype)


def fake_quantize(x: Tensor, fmt: Format) -> Tensor:
    """Round trip of x [..., K] through codes, in x's own dtype."""
    return dequantize(quantize(x, fmt), fmt, x.dtype)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., K] -> bytes; `mixbits.formats.pack` says where their bits are."""
    planes, shift = [], 0
    for width in PLANES.get(bits, (bits,)):
        planes.append(_pack_plane(codes >> shift & (1 << width) - 1, width))
        shift += width
    return planes[0] if len(planes) == 1 else torch.cat(planes, -1)


def _pack_plane(codes: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    pad = -codes.shape[-1] % per_byte
    padded = torch.nn.functional.pad(codes, (0, pad)).unflatten(-1, (-1, per_byte))
    shifts = torch.arange(per_byte, device=codes.device) * bits
    return (padded.int() << shifts).sum(-1).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack_codes`; `columns` is K."""
    codes, shift, start = None, 0, 0
    for width in PLANES.get(bits, (bits,)):
        stop = start - (-columns * width // 8)
        plane = _unpack_plane(packed[..., start:stop], width, columns) << shift
        codes = plane if codes is None else codes | plane
        shift, start = shift + width, stop
    assert codes is not None
    return codes


def _unpack_plane(packed: Tensor, bits: int, columns: int) -> Tensor:
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
