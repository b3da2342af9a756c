"""Sums of the quantization error over slabs, for several formats in one pass over the weight.

    fisher     sum over rows o and a slab's columns k of  row_o * column_k * (W - Q(W))_ok^2
    gradient   sum of  |G_ok * (W - Q(W))_ok|

The weight and the gradient are read once however many formats there are. A program owns 128
columns (4 slabs) and a fixed set of row tiles, and writes its sums to its own place of a
workspace; a second kernel adds the places in their order. No atomics: the same input gives the
same bits. Errors and sums are float64, as in the reference, from which only the order of the
additions differs; a handful of double operations per element stay below the memory time on
data-center GPUs and are affordable elsewhere.
"""

from collections.abc import Sequence

import torch

import triton
import triton.language as tl
from mixbits.formats import MX_GROUP, Format

from . import numerics
from .launch import TILE_ROWS, device_of

MAX_ROW_PROGRAMS = 64  # bounds the workspace; each has its own set of row tiles


@triton.jit
def quantization_error(w, CODE: tl.constexpr):
    """w float32 [R, C] -> w - Q(w) float64 [R, C]; C is a multiple of the group size."""
    size: tl.constexpr = numerics.group_size(CODE)
    grouped = tl.reshape(w, (w.shape[0], w.shape[1] // size, size))
    values = tl.reshape(numerics.fake_quantize(grouped, CODE), w.shape)
    return w.to(tl.float64) - values.to(tl.float64)


@triton.jit
def statistics_kernel(
    weight_ptr,  # [rows, columns], contiguous
    gradient_ptr,  # [rows, columns]; read if GRADIENT
    row_weight_ptr,  # float64 [rows]; read if not GRADIENT
    column_weight_ptr,  # float64 [columns]; read if not GRADIENT
    partial_ptr,  # float64 [row programs, formats, slabs]
    rows,
    columns,
    slabs,
    CODES: tl.constexpr,  # tuple of format numbers
    GRADIENT: tl.constexpr,
    FORMATS: tl.constexpr,  # their number, rounded up to a power of two
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLAB: tl.constexpr,
):
    tile_slabs: tl.constexpr = COLUMNS // SLAB
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    column_inside = column < columns
    format_index = tl.arange(0, FORMATS)[:, None]
    sums = tl.zeros((FORMATS, tile_slabs), tl.float64)
    for start in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        row_inside = row < rows
        inside = row_inside & column_inside
        offset = row.to(tl.int64) * columns + column
        w = numerics.to_float32(tl.load(weight_ptr + offset, mask=inside, other=0.0))
        if GRADIENT:
            factor = numerics.to_float32(tl.load(gradient_ptr + offset, mask=inside, other=0.0))
            factor = factor.to(tl.float64)
        else:
            factor = tl.load(row_weight_ptr + row, mask=row_inside, other=0.0)
            factor *= tl.load(column_weight_ptr + column, mask=column_inside, other=0.0)
        for i in tl.static_range(len(CODES)):
            error = quantization_error(w, CODES[i])
            term = tl.abs(factor * error) if GRADIENT else factor * (error * error)
            by_slab = tl.reshape(tl.sum(term, axis=0), (tile_slabs, SLAB))
            sums += tl.where(format_index == i, tl.sum(by_slab, axis=1)[None, :], 0.0)
    slab = tl.program_id(0) * tile_slabs + tl.arange(0, tile_slabs)[None, :]
    place = (tl.program_id(1) * len(CODES) + format_index) * slabs + slab
    inside = (format_index < len(CODES)) & (slab < slabs)
    tl.store(partial_ptr + place, sums, mask=inside)


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
    if weight.numel() == 0 or not formats:
        return out
    parts = min(triton.cdiv(rows, TILE_ROWS), MAX_ROW_PROGRAMS)
    partial = out.new_empty((parts, *out.shape))
    with device_of(weight):
        statistics_kernel[(triton.cdiv(columns, numerics.TILE_COLUMNS), parts)](
            weight,
            weight if gradient is None else gradient,
            row_weight,
            column_weight,
            partial,
            rows,
            columns,
            slabs,
            CODES=tuple(fmt.code for fmt in formats),
            GRADIENT=gradient is not None,
            FORMATS=triton.next_power_of_2(len(formats)),
            ROWS=TILE_ROWS,
            COLUMNS=numerics.TILE_COLUMNS,
            SLAB=MX_GROUP,
            enable_fp_fusion=False,
        )
        block = 128
        sum_partials_kernel[(triton.cdiv(out.numel(), block),)](
            partial, out, parts, out.numel(), BLOCK=block
        )
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
