"""Packed weight -> floats, one tile of rows by 128 columns per program."""

import torch

import triton
import triton.language as tl
from mixbits.formats.pack import Packed
from mixbits.formats.schemes import Format

from . import numerics
from .launch import TILE_ROWS, device_of
from .packed import load_codes, load_scale, load_zero_point, tile_groups
from .tiles import program_rows, program_span


@triton.jit
def dequantize_kernel(
    packed_ptr,  # uint8 [rows, packed_bytes]
    scale_ptr,  # uint8, float16 or float32 [rows, groups]
    zero_ptr,  # uint8 [rows, zero_bytes]; not read for symmetric formats
    divisor_ptr,  # float32 [1]; read beside scales in e4m3
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
    size: tl.constexpr = numerics.group_columns(CODE, COLUMNS)
    tile = tl.program_id(1)
    row, row_inside = program_rows(rows, ROWS)
    codes = load_codes(packed_ptr, row, columns, packed_bytes, tile, row_inside, CODE, COLUMNS)
    group, group_inside = tile_groups(groups, tile, row_inside, CODE, COLUMNS)
    factor = load_scale(scale_ptr, row, group, groups, group_inside, CODE)
    if numerics.scale_kind(CODE) == "e4m3":
        factor, divisor = tl.broadcast(factor, tl.load(divisor_ptr))
        factor = tl.div_rn(factor, divisor)
    zero_point = load_zero_point(zero_ptr, row, group, groups, zero_bytes, group_inside, CODE)

    codes = tl.reshape(codes, (ROWS, COLUMNS // size, size))
    values = numerics.decode(codes, zero_point[:, :, None], CODE) * factor[:, :, None]
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
    codes, scale, zero_point, divisor = packed
    grid = (triton.cdiv(rows, TILE_ROWS), triton.cdiv(columns, numerics.TILE_COLUMNS))
    with device_of(codes):
        dequantize_kernel[grid](
            codes,
            scale,
            codes if zero_point is None else zero_point,
            scale if divisor is None else divisor,
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
