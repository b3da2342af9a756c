"""Fake quantization: every group of a row goes through its codes and back, in one pass.

One program owns a tile of rows by 128 columns, which holds whole groups of every size; of scales
that are those of rows, `bases` has found what they follow from.
"""

import torch

import triton
import triton.language as tl
from mixbits.formats.schemes import Format

from . import numerics
from .bases import base_of, load_base
from .launch import TILE_ROWS, device_of
from .tiles import program_rows, program_span


@triton.jit
def fake_quantize_kernel(
    x_ptr,  # [rows, columns], contiguous
    base_ptr,  # float32 [1] or [rows]; not read by formats without
    out_ptr,  # the same shape and dtype
    rows,
    columns,
    CODE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    size: tl.constexpr = numerics.group_columns(CODE, COLUMNS)
    row, row_inside = program_rows(rows, ROWS)
    column, inside = program_span(columns, row_inside, COLUMNS)
    offset = row * columns + column
    x = numerics.to_float32(tl.load(x_ptr + offset, mask=inside, other=0.0))
    grouped = tl.reshape(x, (ROWS, COLUMNS // size, size))
    base = load_base(base_ptr, row, row_inside, CODE)
    values = tl.reshape(numerics.fake_quantize(grouped, base, CODE), (ROWS, COLUMNS))
    out = numerics.from_float32(values, out_ptr.dtype.element_ty)
    tl.store(out_ptr + offset, out, mask=inside)


def fake_quantize(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """x [..., K] (float32, float16, bfloat16; contiguous) -> the same shape and dtype."""
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    columns = x.shape[-1]
    rows = x.numel() // columns
    grid = (triton.cdiv(rows, TILE_ROWS), triton.cdiv(columns, numerics.TILE_COLUMNS))
    base = base_of(x.view(rows, columns), fmt)
    with device_of(x):
        fake_quantize_kernel[grid](
            x,
            x if base is None else base,
            out,
            rows,
            columns,
            CODE=fmt.code,
            ROWS=TILE_ROWS,
            COLUMNS=numerics.TILE_COLUMNS,
            enable_fp_fusion=False,
        )
    return out
