"""Activations as the segments of a linear want them: in order, rotated, and rounded, in one pass.

What `mixbits.formats.arrange` and fake quantization do one after the other, to the bit. One
program owns a tile of rows by 128 columns of one segment. Segments begin at multiples of 32
columns, so that groups and rotated blocks lie within one tile. Scales of whole rows do not: such
segments are rounded in a pass of their own.
"""

import torch

import triton
import triton.language as tl
from mixbits.formats.pack import Operand
from mixbits.formats.schemes import MX_GROUP

from . import numerics
from .fake_quant import fake_quantize
from .launch import TILE_ROWS, device_of


@triton.constexpr_function
def log2(width):
    return width.bit_length() - 1


@triton.jit
def hadamard(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """x float32 [ROWS, COLUMNS] times the Hadamard matrix, WIDTH columns at a time: sums and
    differences of pairs whose numbers differ in one bit, in the order of mixbits.formats.arrange.
    """
    for half in tl.static_range(log2(WIDTH)):
        pairs = tl.reshape(x, (ROWS, COLUMNS >> (half + 1), 2, 1 << half))
        a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (ROWS, COLUMNS))
    return x


@triton.jit
def _arrange_tile(
    x_ptr,
    order_ptr,
    out_ptr,
    rows,
    columns,
    first,  # the tile's first column
    end,  # of the segment
    CODE: tl.constexpr,
    ORDERED: tl.constexpr,
    ROTATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = row.to(tl.int64)[:, None] * columns
    column = first + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < end)[None, :]
    source = column
    if ORDERED:
        source = tl.load(order_ptr + column, mask=column < end, other=0).to(tl.int32)
    x = numerics.to_float32(tl.load(x_ptr + start + source[None, :], mask=inside, other=0.0))
    if ROTATED:
        whole = column // WIDTH * WIDTH + WIDTH <= columns
        x = tl.where(whole[None, :], hadamard(x, ROWS, COLUMNS, WIDTH), x)
    if CODE != 0:
        tl.static_assert(not numerics.has_base(CODE))
        size: tl.constexpr = numerics.group_columns(CODE, COLUMNS)
        grouped = tl.reshape(x, (ROWS, COLUMNS // size, size))
        none = tl.zeros((ROWS, 1), tl.float32)
        x = tl.reshape(numerics.fake_quantize(grouped, none, CODE), (ROWS, COLUMNS))
    out = numerics.from_float32(x, out_ptr.dtype.element_ty)
    tl.store(out_ptr + start + column[None, :], out, mask=inside)


@triton.jit
def arrange_kernel(
    x_ptr,  # [rows, columns], contiguous
    order_ptr,  # uint8, int16 or int32 [columns]; not read unless ORDERED
    out_ptr,  # [rows, columns], contiguous
    rows,
    columns,
    widths,  # columns of each segment
    CODES: tl.constexpr,  # what each segment's columns are rounded to; 0: they are not
    ORDERED: tl.constexpr,
    ROTATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,  # columns that are rotated together
):
    tile = tl.program_id(1)
    first = 0
    for s in tl.static_range(len(CODES)):
        tiles = tl.cdiv(widths[s], COLUMNS)
        if (tile >= 0) & (tile < tiles):
            _arrange_tile(
                x_ptr,
                order_ptr,
                out_ptr,
                rows,
                columns,
                first + tile * COLUMNS,
                first + widths[s],
                CODES[s],
                ORDERED,
                ROTATED,
                ROWS,
                COLUMNS,
                WIDTH,
            )
        tile -= tiles
        first += widths[s]


def arrange(x: torch.Tensor, operand: Operand, dtype: torch.dtype) -> torch.Tensor:
    """x [M, K] as `operand` multiplies it, in `dtype`; x itself where that is how it comes."""
    if operand.takes_input_as_is:
        return x
    formats = [one.activation for one in operand.parts]
    if any(fmt is not None and fmt.scale in ("e4m3", "float32") for fmt in formats):
        return _arrange_then_round(x, operand, dtype)
    codes = tuple(0 if fmt is None else fmt.code for fmt in formats)
    rows, columns = x.shape
    out = x.new_empty((rows, columns), dtype=dtype)
    if out.numel() == 0:
        return out
    tiles = sum(triton.cdiv(width, numerics.TILE_COLUMNS) for width in operand.columns)
    with device_of(x):
        arrange_kernel[(triton.cdiv(rows, TILE_ROWS), tiles)](
            x,
            x if operand.order is None else operand.order,
            out,
            rows,
            columns,
            operand.columns,
            CODES=codes,
            ORDERED=operand.order is not None,
            ROTATED=operand.rotated,
            ROWS=TILE_ROWS,
            COLUMNS=numerics.TILE_COLUMNS,
            WIDTH=MX_GROUP,
            enable_fp_fusion=False,
        )
    return out


def _arrange_then_round(x: torch.Tensor, operand: Operand, dtype: torch.dtype) -> torch.Tensor:
    bare = operand._replace(parts=tuple(one._replace(activation=None) for one in operand.parts))
    pieces = arrange(x, bare, bare.input_dtype(x.dtype)).split(operand.columns, 1)
    rounded = [
        piece if one.activation is None else fake_quantize(piece.contiguous(), one.activation)
        for piece, one in zip(pieces, operand.parts, strict=True)
    ]
    return torch.cat(rounded, 1).to(dtype)
