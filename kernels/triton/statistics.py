"""Column sums for several formats in one pass over a matrix: quantization errors, and squares.

    fisher     sum over rows o of  row_o * (W - Q(W))_ok^2, then times column_k, per slab
    gradient   sum of  |G_ok * (W - Q(W))_ok|, per slab
    squares    sum over tokens t of  x_tk^2, and of  (x - Q(x))_tk^2  per format, per column

The matrix is read once however many formats there are. A program owns 128 columns and a fixed set
of row tiles; it adds tile after tile elementwise in registers, then adds up the tile's rows, and
writes to its own place of a workspace; a second kernel adds the places in their order. No atomics:
the same input gives the same bits. An error is exact in float32: both of its sides are multiples
of a step that it is less than 2^24 of. Sums are float64, as in the reference, from which only the
order of the additions differs.
"""

from collections.abc import Sequence

import torch

import triton
import triton.language as tl
from mixbits.formats.schemes import MX_GROUP, Format

from . import numerics
from .bases import base_of, load_base
from .launch import device_of

MAX_FORMATS = 4  # of one pass: their sums, 16 registers per thread and format, must all fit
STATISTICS_ROWS = 8  # of a tile: by 128 columns and 4 warps, 8 elements per thread
STAGES = tl.constexpr(3)  # row tiles in flight
MAX_ROW_PROGRAMS = 64  # bounds the workspace; each has its own set of row tiles


@triton.jit
def quantization_error(w, base_ptr, row, row_inside, CODE: tl.constexpr):
    """w float32 [R, C] of the rows [R, 1] -> w - Q(w) float32 [R, C]; C is a multiple of the group
    size.
    """
    size: tl.constexpr = numerics.group_columns(CODE, w.shape[1])
    grouped = tl.reshape(w, (w.shape[0], w.shape[1] // size, size))
    base = load_base(base_ptr, row, row_inside, CODE)
    return w - tl.reshape(numerics.fake_quantize(grouped, base, CODE), w.shape)


@triton.jit
def load_tile(base_ptr, offset, inside):
    return numerics.to_float32(tl.load(base_ptr + offset, mask=inside, other=0.0))


@triton.jit
def add_errors(
    sums, w, factor, base_ptrs, row, row_inside, CODES: tl.constexpr, GRADIENT: tl.constexpr
):
    """A float64 [R, C] tile of terms, added to the sums of each format."""
    added = ()
    for i in tl.static_range(len(CODES)):
        error = quantization_error(w, base_ptrs[i], row, row_inside, CODES[i]).to(tl.float64)
        term = tl.abs(factor * error) if GRADIENT else error * error * factor
        added = added + (sums[i] + term,)  # noqa: RUF005
    return added


@triton.jit
def add_squares(sums, x, base_ptrs, row, row_inside, CODES: tl.constexpr):
    """Squares in float32 of x [R, C] and of each format's error, added to float64 sums."""
    added = (sums[0] + (x * x).to(tl.float64),)
    for i in tl.static_range(len(CODES)):
        error = quantization_error(x, base_ptrs[i], row, row_inside, CODES[i])
        added = added + (sums[i + 1] + (error * error).to(tl.float64),)  # noqa: RUF005
    return added


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """COUNT float64 tiles [ROWS, COLUMNS]."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros((ROWS, COLUMNS), tl.float64),)  # noqa: RUF005
    return sums


@triton.jit
def statistics_kernel(
    weight_ptr,  # [rows, columns], contiguous
    gradient_ptr,  # [rows, columns]; read if GRADIENT
    row_weight_ptr,  # float64 [rows]; read if not GRADIENT
    column_weight_ptr,  # float64 [columns]; read if not GRADIENT
    base_ptrs,  # of each format, float32 [1] or [rows]; not read by formats without
    partial_ptr,  # float64 [row programs, formats, slabs]
    rows,
    columns,
    slabs,
    CODES: tl.constexpr,  # tuple of format numbers
    GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLAB: tl.constexpr,
):
    tile_slabs: tl.constexpr = COLUMNS // SLAB
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_inside = column < columns
    sums = zeros(len(CODES), ROWS, COLUMNS)
    for start in tl.range(
        tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS, num_stages=STAGES
    ):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & column_inside[None, :]
        offset = row.to(tl.int64) * columns + column[None, :]
        w = load_tile(weight_ptr, offset, inside)
        if GRADIENT:
            factor = load_tile(gradient_ptr, offset, inside).to(tl.float64)
        else:
            factor = tl.load(row_weight_ptr + row, mask=row < rows, other=0.0)
        sums = add_errors(sums, w, factor, base_ptrs, row, row < rows, CODES, GRADIENT)
    slab = tl.program_id(0) * tile_slabs + tl.arange(0, tile_slabs)
    for i in tl.static_range(len(CODES)):
        by_column = tl.sum(sums[i], axis=0)
        if not GRADIENT:
            by_column *= tl.load(column_weight_ptr + column, mask=column_inside, other=0.0)
        by_slab = tl.sum(tl.reshape(by_column, (tile_slabs, SLAB)), axis=1)
        place = (tl.program_id(1) * len(CODES) + i) * slabs + slab
        tl.store(partial_ptr + place, by_slab, mask=slab < slabs)


@triton.jit
def square_sums_kernel(
    x_ptr,  # [rows, columns], contiguous
    base_ptrs,  # of each format, float32 [1] or [rows]; not read by formats without
    partial_ptr,  # float64 [row programs, 1 + formats, columns]
    rows,
    columns,
    CODES: tl.constexpr,  # tuple of format numbers
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_inside = column < columns
    sums = zeros(1 + len(CODES), ROWS, COLUMNS)
    for start in tl.range(
        tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS, num_stages=STAGES
    ):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & column_inside[None, :]
        offset = row.to(tl.int64) * columns + column[None, :]
        x = load_tile(x_ptr, offset, inside)
        sums = add_squares(sums, x, base_ptrs, row, row < rows, CODES)
    for i in tl.static_range(1 + len(CODES)):
        place = (tl.program_id(1) * (1 + len(CODES)) + i).to(tl.int64) * columns + column
        tl.store(partial_ptr + place, tl.sum(sums[i], axis=0), mask=column_inside)


@triton.jit
def sum_partials_kernel(
    partial_ptr,  # float64 [parts, size]
    out_ptr,  # float64 [size]
    parts,
    size,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.zeros((BLOCK,), tl.float64)
    for part in range(parts):
        total += tl.load(partial_ptr + part * size + place, mask=inside, other=0.0)
    tl.store(out_ptr + place, total, mask=inside)


def _sum_partials(partial: torch.Tensor, out: torch.Tensor) -> None:
    """partial [parts, *out.shape] -> out, added in the order of the parts."""
    block = 128
    grid = (triton.cdiv(out.numel(), block),)
    sum_partials_kernel[grid](partial, out, len(partial), out.numel(), BLOCK=block)


def _bases(x: torch.Tensor, formats: Sequence[Format]) -> tuple[torch.Tensor, ...]:
    """Of each format what its scales follow from; anything, where that is nothing."""
    found = (base_of(x, fmt) for fmt in formats)
    return tuple(x if base is None else base for base in found)


def _row_programs(rows: int) -> int:
    return min(triton.cdiv(rows, STATISTICS_ROWS), MAX_ROW_PROGRAMS)


def _statistics(
    weight: torch.Tensor,
    gradient: torch.Tensor | None,
    row_weight: torch.Tensor,
    column_weight: torch.Tensor,
    formats: Sequence[Format],
) -> torch.Tensor:
    rows, columns = weight.shape
    slabs = triton.cdiv(columns, MX_GROUP)
    out = torch.zeros((len(formats), slabs), dtype=torch.float64, device=weight.device)
    if weight.numel() == 0:
        return out
    grid = (triton.cdiv(columns, numerics.TILE_COLUMNS), _row_programs(rows))
    with device_of(weight):
        for first in range(0, len(formats), MAX_FORMATS):
            part = formats[first : first + MAX_FORMATS]
            partial = out.new_empty((grid[1], len(part), slabs))
            statistics_kernel[grid](
                weight,
                weight if gradient is None else gradient,
                row_weight,
                column_weight,
                _bases(weight, part),
                partial,
                rows,
                columns,
                slabs,
                CODES=tuple(fmt.code for fmt in part),
                GRADIENT=gradient is not None,
                ROWS=STATISTICS_ROWS,
                COLUMNS=numerics.TILE_COLUMNS,
                SLAB=MX_GROUP,
                enable_fp_fusion=False,
            )
            _sum_partials(partial, out[first : first + len(part)])
    return out


def fisher_statistics(
    weight: torch.Tensor,
    row_weight: torch.Tensor,
    column_weight: torch.Tensor,
    formats: Sequence[Format],
) -> torch.Tensor:
    """weight [N, K], row_weight [N], column_weight [K] -> float64 [formats, ceil(K / 32)]."""
    row_weight, column_weight = row_weight.double(), column_weight.double()
    return _statistics(weight, None, row_weight, column_weight, formats)


def gradient_statistics(
    weight: torch.Tensor, gradient: torch.Tensor, formats: Sequence[Format]
) -> torch.Tensor:
    """weight [N, K], gradient [N, K] -> float64 [formats, ceil(K / 32)]."""
    return _statistics(weight, gradient, weight, weight, formats)


def square_sums(x: torch.Tensor, formats: Sequence[Format]) -> torch.Tensor:
    """x [T, K] -> float64 [1 + formats, K]; in passes of at most MAX_FORMATS formats."""
    rows, columns = x.shape
    out = torch.zeros((1 + len(formats), columns), dtype=torch.float64, device=x.device)
    if x.numel() == 0:
        return out
    grid = (triton.cdiv(columns, numerics.TILE_COLUMNS), _row_programs(rows))
    with device_of(x):
        for first in range(0, max(1, len(formats)), MAX_FORMATS):
            part = formats[first : first + MAX_FORMATS]
            partial = out.new_empty((grid[1], 1 + len(part), columns))
            square_sums_kernel[grid](
                x,
                _bases(x, part),
                partial,
                rows,
                columns,
                CODES=tuple(fmt.code for fmt in part),
                ROWS=STATISTICS_ROWS,
                COLUMNS=numerics.TILE_COLUMNS,
                enable_fp_fusion=False,
            )
            sums = out.new_empty(partial.shape[1:])
            _sum_partials(partial, sums)
            out[0] = sums[0]
            out[1 + first : 1 + first + len(part)] = sums[1:]
    return out
