"""Quantize a weight and pack its codes, scales and zero points: floats are read once.

One program owns a tile of rows by whole groups, wide enough that the packed zero points of the
tile are whole bytes, so that no two programs write to the same byte.
"""

import torch

import triton
import triton.language as tl
from mixbits.formats.pack import Packed, empty_packed
from mixbits.formats.schemes import Format

from . import numerics
from .bases import base_of, load_base
from .launch import TILE_ROWS, device_of
from .packed import store_codes
from .tiles import program_rows, program_span


@triton.jit
def quantize_pack_kernel(
    weight_ptr,  # [rows, columns], contiguous
    base_ptr,  # float32 [1] or [rows]; not read by formats without
    packed_ptr,  # uint8 [rows, packed_bytes]
    scale_ptr,  # uint8, float16 or float32 [rows, groups]
    zero_ptr,  # uint8 [rows, zero_bytes]; not written for symmetric formats
    rows,
    columns,
    packed_bytes,
    groups,
    zero_bytes,
    CODE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    size: tl.constexpr = numerics.group_columns(CODE, COLUMNS)
    tile_groups: tl.constexpr = COLUMNS // size
    tile = tl.program_id(1)
    row, row_inside = program_rows(rows, ROWS)
    column, inside = program_span(columns, row_inside, COLUMNS)
    w = tl.load(weight_ptr + row * columns + column, mask=inside, other=0.0)
    grouped = tl.reshape(numerics.to_float32(w), (ROWS, tile_groups, size))
    base = load_base(base_ptr, row, row_inside, CODE)
    codes, scale, zero_point = numerics.quantize(grouped, base, CODE)

    # Columns beyond the row fill the last byte with zeros.
    codes = tl.where(inside, tl.reshape(codes, (ROWS, COLUMNS)), 0)
    store_codes(packed_ptr, codes, row, columns, packed_bytes, tile, row_inside, CODE)

    group, group_inside = program_span(groups, row_inside, tile_groups)
    scale = scale.to(scale_ptr.dtype.element_ty)
    tl.store(scale_ptr + row * groups + group, scale, mask=group_inside)

    if not numerics.is_symmetric(CODE):
        zero_point = tl.where(group_inside, zero_point, 0)
        store_codes(zero_ptr, zero_point, row, groups, zero_bytes, tile, row_inside, CODE)


def quantize_pack(weight: torch.Tensor, fmt: Format) -> Packed:
    """weight [N, K] (float32, float16, bfloat16; contiguous) -> as mixbits.formats.pack says."""
    rows, columns = weight.shape
    packed = empty_packed(fmt, rows, columns, weight.device)
    if weight.numel() == 0:
        return packed
    tile = numerics.tile_columns(fmt)
    tile_rows = TILE_ROWS * numerics.TILE_COLUMNS // tile
    zero_point = packed.weight_zero_point
    base = base_of(weight, fmt)
    with device_of(weight):
        quantize_pack_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(columns, tile))](
            weight,
            weight if base is None else base,
            packed.weight_packed,
            packed.weight_scale,
            packed.weight_packed if zero_point is None else zero_point,
            rows,
            columns,
            fmt.packed_bytes(columns),
            fmt.groups(columns),
            fmt.zero_point_bytes(columns),
            CODE=fmt.code,
            ROWS=tile_rows,
            COLUMNS=tile,
            enable_fp_fusion=False,
        )
    return packed if fmt.scale != "e4m3" else packed._replace(weight_global_scale=base)
