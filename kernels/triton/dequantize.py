"""Packed weight -> floats, one tile of rows by 128 columns per program."""

import torch

import triton
import triton.language as tl
from mixbits.formats.pack import Packed
from mixbits.formats.schemes import Format

from . import numerics
from .launch import TILE_ROWS, device_of
from .tiles import program_rows, program_span


@triton.jit
def load_zero_point(zero_ptr, row, group, zero_bytes, inside, CODE: tl.constexpr):
    """int32 zero points of [row, group] (int64 [R, 1] and int32 [1, G]); 0 where there are none."""
    bits: tl.constexpr = numerics.code_bits(CODE)
    if numerics.is_symmetric(CODE):
        zero_point = tl.zeros(inside.shape, tl.int32)
    else:
        byte = tl.load(zero_ptr + row * zero_bytes + group * bits // 8, mask=inside, other=0)
        zero_point = (byte.to(tl.int32) >> (group * bits % 8)) & ((1 << bits) - 1)
    return zero_point


@triton.jit
def dequantize_kernel(
    packed_ptr,  # uint8 [rows, packed_bytes]
    scale_ptr,  # uint8 or float16 [rows, groups]
    zero_ptr,  # uint8 [rows, zero_bytes]; not read for symmetric formats
    out_ptr,  # [rows, columns], rows `stride` values apart
    rows,
    columns,
    stride,
    packed_bytes,
    groups,
    zero_bytes,
    CODE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    size: tl.constexpr = numerics.group_size(CODE)
    bits: tl.constexpr = numerics.code_bits(CODE)
    tile_groups: tl.constexpr = COLUMNS // size
    tile_bytes: tl.constexpr = COLUMNS * bits // 8
    row, row_inside = program_rows(rows, ROWS)
    byte, byte_inside = program_span(packed_bytes, row_inside, tile_bytes)
    packed = tl.load(packed_ptr + row * packed_bytes + byte, mask=byte_inside, other=0)
    group, group_inside = program_span(groups, row_inside, tile_groups)
    scale = tl.load(scale_ptr + row * groups + group, mask=group_inside, other=0)
    zero_point = load_zero_point(zero_ptr, row, group, zero_bytes, group_inside, CODE)

    codes = tl.reshape(numerics.unpack_bits(packed, bits), (ROWS, tile_groups, size))
    values = numerics.decode(codes, zero_point[:, :, None], CODE)
    values = values * numerics.scale_value(scale, CODE)[:, :, None]
    column, inside = program_span(columns, row_inside, COLUMNS)
    out = numerics.from_float32(tl.reshape(values, (ROWS, COLUMNS)), out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride + column, out, mask=inside)


def dequantize(packed: Packed, fmt: Format, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Packed [N, K] -> [N, K] in `dtype` (float32, float16, bfloat16); `in_features` is K."""
    codes = packed.weight_packed
    out = torch.empty((codes.shape[0], in_features), dtype=dtype, device=codes.device)
    dequantize_into(out, packed, fmt)
    return out


def dequantize_into(out: torch.Tensor, packed: Packed, fmt: Format) -> None:
    """Packed [N, K] -> out [N, K] of any of these dtypes; rows may be part of longer ones."""
    rows, columns = out.shape
    if out.numel() == 0:
        return
    codes, zero_point = packed.weight_packed, packed.weight_zero_point
    grid = (triton.cdiv(rows, TILE_ROWS), triton.cdiv(columns, numerics.TILE_COLUMNS))
    with device_of(codes):
        dequantize_kernel[grid](
            codes,
            packed.weight_scale,
            codes if zero_point is None else zero_point,
            out,
            rows,
            columns,
            out.stride(0),
            fmt.packed_bytes(columns),
            fmt.groups(columns),
            fmt.zero_point_bytes(columns),
            CODE=fmt.code,
            ROWS=TILE_ROWS,
            COLUMNS=numerics.TILE_COLUMNS,
            enable_fp_fusion=False,
        )
