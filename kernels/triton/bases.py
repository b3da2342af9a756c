"""What scales follow from before groups are looked at: a number of each row, or of the tensor.

    e4m3      the float32 that scales are divided by, of the tensor or of each row
    float32   the scale of the row itself

A pass of its own over x finds the largest magnitudes; what follows from them is said in
`mixbits.formats.reference`.
"""

import torch

import triton
import triton.language as tl
from mixbits.formats import reference
from mixbits.formats.schemes import Format

from . import numerics
from .launch import TILE_ROWS, device_of
from .tiles import program_rows


@triton.jit
def row_maxima_kernel(
    x_ptr,  # [rows, columns], contiguous
    out_ptr,  # float32 [rows]
    rows,
    columns,
    FINITE: tl.constexpr,  # whether infinities and NaNs are passed over; else they make a NaN
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, row_inside = program_rows(rows, ROWS)
    largest = tl.zeros((ROWS, COLUMNS), tl.int32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        x = tl.load(x_ptr + row * columns + column, mask=row_inside & (column < columns), other=0.0)
        bits = numerics.to_float32(x).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if FINITE:
            bits = tl.where(bits < 0x7F800000, bits, 0)
        largest = tl.maximum(largest, bits)
    found = tl.max(largest, axis=1, keep_dims=True)
    found = tl.where(found < 0x7F800000, found, 0x7FC00000)
    tl.store(out_ptr + row, found.to(tl.float32, bitcast=True), mask=row_inside)


@triton.jit
def load_base(base_ptr, row, row_inside, CODE: tl.constexpr):
    """float32 [R, 1] of the rows [R, 1]; zeros, and nothing read, where a format has none."""
    if not numerics.has_base(CODE):
        base = tl.zeros(row_inside.shape, tl.float32)
    elif numerics.is_tensor_wide(CODE):
        base = tl.load(base_ptr + row * 0)
    else:
        base = tl.load(base_ptr + row, mask=row_inside, other=1.0)
    return base


def base_of(x: torch.Tensor, fmt: Format) -> torch.Tensor | None:
    """float32 [1] of x [rows, columns], or [rows]; None for a format without."""
    if fmt.scale not in ("e4m3", "float32"):
        return None
    rows, columns = x.shape
    maxima = torch.empty(rows, dtype=torch.float32, device=x.device)
    with device_of(x):
        row_maxima_kernel[(triton.cdiv(rows, TILE_ROWS),)](
            x,
            maxima,
            rows,
            columns,
            FINITE=fmt.scale == "e4m3",
            ROWS=TILE_ROWS,
            COLUMNS=numerics.TILE_COLUMNS,
        )
    if fmt.scale == "float32":
        return reference.row_scale(maxima, fmt)
    if fmt.tensor_scale == "tensor":
        maxima = maxima.amax().reshape(1)
    return reference.divisor_of(maxima, fmt)
