"""Tiles of packed weights (`mixbits.formats.pack`): codes in one plane or two, scales, zero points.

A tile is COLUMNS columns of some rows, number `tile` of them. Rows are int64 [R, 1], and
`row_inside` [R, 1] says which there are; what lies beyond a row is 0.
"""

import triton
import triton.language as tl

from . import numerics


@triton.jit
def plane_bytes(count, BITS: tl.constexpr):
    return (count * BITS + 7) // 8


@triton.jit
def _tile_bytes(tile, size, row_inside, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's bytes of a plane of `size` bytes: their numbers [1, B], which there are [R, B]."""
    tile_bytes: tl.constexpr = COLUMNS * BITS // 8
    byte = tile * tile_bytes + tl.arange(0, tile_bytes)[None, :]
    return byte, row_inside & (byte < size)


@triton.jit
def _load_plane(base, size, tile, row_inside, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    byte, inside = _tile_bytes(tile, size, row_inside, BITS, COLUMNS)
    return numerics.unpack_bits(tl.load(base + byte, mask=inside, other=0), BITS)


@triton.jit
def _store_plane(base, size, codes, tile, row_inside, BITS: tl.constexpr):
    byte, inside = _tile_bytes(tile, size, row_inside, BITS, codes.shape[1])
    tl.store(base + byte, numerics.pack_bits(codes, BITS), mask=inside)


@triton.jit
def load_codes(
    packed_ptr, row, columns, row_bytes, tile, row_inside, CODE: tl.constexpr, COLUMNS: tl.constexpr
):
    """int32 [R, COLUMNS] of rows of `columns` codes in `row_bytes` bytes."""
    low: tl.constexpr = numerics.lower_bits(CODE)
    high: tl.constexpr = numerics.code_bits(CODE) - low
    base = packed_ptr + row * row_bytes
    if high == 0:
        codes = _load_plane(base, row_bytes, tile, row_inside, low, COLUMNS)
    else:
        first = plane_bytes(columns, low)
        codes = _load_plane(base, first, tile, row_inside, low, COLUMNS)
        upper = _load_plane(base + first, row_bytes - first, tile, row_inside, high, COLUMNS)
        codes = codes | (upper << low)
    return codes


@triton.jit
def store_codes(packed_ptr, codes, row, columns, row_bytes, tile, row_inside, CODE: tl.constexpr):
    """The inverse, of codes int32 [R, C] that are zeros beyond `columns`."""
    low: tl.constexpr = numerics.lower_bits(CODE)
    high: tl.constexpr = numerics.code_bits(CODE) - low
    base = packed_ptr + row * row_bytes
    if high == 0:
        _store_plane(base, row_bytes, codes, tile, row_inside, low)
    else:
        first = plane_bytes(columns, low)
        _store_plane(base, first, codes & ((1 << low) - 1), tile, row_inside, low)
        _store_plane(base + first, row_bytes - first, codes >> low, tile, row_inside, high)


@triton.jit
def tile_groups(groups, tile, row_inside, CODE: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's groups: their numbers [1, G], and which there are [R, G]."""
    count: tl.constexpr = COLUMNS // numerics.group_columns(CODE, COLUMNS)
    group = tile * count + tl.arange(0, count)[None, :]
    if CODE >> 16 == 0:
        group = group * 0  # every tile has the row's one
    return group, row_inside & (group < groups)


@triton.jit
def load_scale(scale_ptr, row, group, groups, inside, CODE: tl.constexpr):
    """float32 [R, G]: what the stored scales of `tile_groups` stand for."""
    scale = tl.load(scale_ptr + row * groups + group, mask=inside, other=0)
    return numerics.scale_value(scale, CODE)


@triton.jit
def _load_zero_bits(base, group, inside, BITS: tl.constexpr):
    byte = tl.load(base + group * BITS // 8, mask=inside, other=0)
    return (byte.to(tl.int32) >> (group * BITS % 8)) & ((1 << BITS) - 1)


@triton.jit
def load_zero_point(zero_ptr, row, group, groups, zero_bytes, inside, CODE: tl.constexpr):
    """int32 [R, G]; 0 where there are none."""
    low: tl.constexpr = numerics.lower_bits(CODE)
    high: tl.constexpr = numerics.code_bits(CODE) - low
    base = zero_ptr + row * zero_bytes
    if numerics.is_symmetric(CODE):
        zero_point = tl.zeros(inside.shape, tl.int32)
    else:
        zero_point = _load_zero_bits(base, group, inside, low)
        if high != 0:
            upper = _load_zero_bits(base + plane_bytes(groups, low), group, inside, high)
            zero_point = zero_point | (upper << low)
    return zero_point
