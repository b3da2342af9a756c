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
from .launch import TILE_ROWS, device_of
from .tiles import program_rows, program_span


@triton.jit
def quantize_pack_kernel(
    weight_ptr,  # [rows, columns], contiguous
    packed_ptr,  # uint8 [rows, packed_bytes]
    scale_ptr,  # uint8 or float16 [rows, groups]
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
    size: tl.constexpr = numerics.group_size(CODE)
    bits: tl.constexpr = numerics.code_bits(CODE)
    tile_groups: tl.constexpr = COLUMNS // size
    tile_bytes: tl.constexpr = COLUMNS * bits // 8
    row, row_inside = program_rows(rows, ROWS)
    column, inside = program_span(columns, row_inside, COLUMNS)
    w = tl.load(weight_ptr + row * columns + column, mask=inside, other=0.0)
    grouped = tl.reshape(numerics.to_float32(w), (ROWS, tile_groups, size))
    codes, scale, zero_point = numerics.quantize(grouped, CODE)

    # Columns beyond the row fill the last byte with zeros.
    codes = tl.where(inside, tl.reshape(codes, (ROWS, COLUMNS)), 0)
    byte, byte_inside = program_span(packed_bytes, row_inside, tile_bytes)
    packed = numerics.pack_bits(codes, bits)
    tl.store(packed_ptr + row * packed_bytes + byte, packed, mask=byte_inside)

    group, group_inside = program_span(groups, row_inside, tile_groups)
    scale = scale.to(scale_ptr.dtype.element_ty)
    tl.store(scale_ptr + row * groups + group, scale, mask=group_inside)

    if not numerics.is_symmetric(CODE):
        zero_point = tl.where(group_inside, zero_point, 0)
        tile_zero_bytes: tl.constexpr = tile_groups * bits // 8
        byte, byte_inside = program_span(zero_bytes, row_inside, tile_zero_bytes)
        packed = numerics.pack_bits(zero_point, bits)
        tl.store(zero_ptr + row * zero_bytes + byte, packed, mask=byte_inside)


def quantize_pack(weight: torch.Tensor, fmt: Format) -> Packed:
    """weight [N, K] (float32, float16, bfloat16; contiguous) -> as mixbits.formats.pack says."""
    rows, columns = weight.shape
    packed = empty_packed(fmt, rows, columns, weight.device)
    if weight.numel() == 0:
        return packed
    tile = numerics.tile_columns(fmt)
    tile_rows = TILE_ROWS * numerics.TILE_COLUMNS // tile
    zero_point = packed.weight_zero_point
    with device_of(weight):
        quantize_pack_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(columns, tile))](
            weight,
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
    return packed
