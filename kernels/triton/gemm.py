"""x [M, K] times a packed weight [N, K] transposed; the weight is dequantized in registers.

Tensor cores multiply in the dtype of x, so the question is where the scale goes:

    MX weights, x bfloat16 or float32   value * 2^e is exact in x's dtype (but for bfloat16's own
                                        subnormals, below 2^-126): scale first, then multiply
    everything else                     codes (or codes minus offset) are exact in float16 and
                                        bfloat16, scaled weights are not: multiply one group of
                                        columns, then scale its float32 sum per output column

so no weight is ever rounded, and sums are float32. float32 inputs are multiplied in IEEE
float32 and not in TF32. This is the portable version; it is not tuned for few rows.
"""

from typing import NamedTuple

import torch

import triton
import triton.language as tl
from mixbits.formats import Format
from mixbits.pack import Packed

from . import INTERPRETED, numerics
from .dequantize import load_zero_point
from .launch import device_of


@triton.jit
def packed_matmul_kernel(
    x_ptr,  # [m, k], contiguous
    packed_ptr,  # uint8 [n, packed_bytes]
    scale_ptr,  # uint8 or float16 [n, groups]
    zero_ptr,  # uint8 [n, zero_bytes]; not read for symmetric formats
    out_ptr,  # [m, n], contiguous
    m,
    n,
    k,
    packed_bytes,
    groups,
    zero_bytes,
    CODE: tl.constexpr,
    dot_dtype: tl.constexpr,  # what the tensor cores multiply
    SCALE_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # whole groups; exactly one unless SCALE_FIRST
):
    size: tl.constexpr = numerics.group_size(CODE)
    bits: tl.constexpr = numerics.code_bits(CODE)
    tile_groups: tl.constexpr = BLOCK_K // size
    tile_bytes: tl.constexpr = BLOCK_K * bits // 8
    x_row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_inside = (x_row < m)[:, None]
    x_base = x_ptr + x_row.to(tl.int64)[:, None] * k
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = (row < n)[:, None]
    row = row.to(tl.int64)[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(k, BLOCK_K)):
        column = step * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_base + column, mask=x_inside & (column < k), other=0.0)
        if dot_dtype == tl.float32:
            x = numerics.to_float32(x)
        byte = step * tile_bytes + tl.arange(0, tile_bytes)[None, :]
        byte_inside = row_inside & (byte < packed_bytes)
        packed = tl.load(packed_ptr + row * packed_bytes + byte, mask=byte_inside, other=0)
        group = step * tile_groups + tl.arange(0, tile_groups)[None, :]
        group_inside = row_inside & (group < groups)
        scale = tl.load(scale_ptr + row * groups + group, mask=group_inside, other=0)
        scale = numerics.scale_value(scale, CODE)
        zero_point = load_zero_point(zero_ptr, row, group, zero_bytes, group_inside, CODE)

        codes = tl.reshape(numerics.unpack_bits(packed, bits), (BLOCK_N, tile_groups, size))
        values = numerics.decode(codes, zero_point[:, :, None], CODE)
        if SCALE_FIRST:
            values = values * scale[:, :, None]
        w = tl.trans(tl.reshape(values, (BLOCK_N, BLOCK_K)).to(dot_dtype))
        if SCALE_FIRST:
            sums = tl.dot(x, w, sums, input_precision="ieee")
        else:
            part = tl.dot(x, w, input_precision="ieee")
            sums += part * tl.reshape(scale, (1, BLOCK_N))
    out_column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    out = numerics.from_float32(sums, out_ptr.dtype.element_ty)
    place = out_ptr + x_row.to(tl.int64)[:, None] * n + out_column
    tl.store(place, out, mask=x_inside & (out_column < n))


class Config(NamedTuple):
    """Compile-time choices of packed_matmul_kernel."""

    scale_first: bool
    block_m: int
    block_n: int
    block_k: int


def choose_config(m: int, fmt: Format, dtype: torch.dtype) -> Config:
    """Tile sizes for m rows of x; pure, and independent of N and K."""
    scale_first = fmt.is_mx and dtype != torch.float16
    block_k = 64 if scale_first else fmt.group_size
    # Triton 3.6 multiplies float32 tiles of 64 rows in TF32 on sm_100 whatever precision is asked.
    block_m = 16 if m <= 16 else 32 if m <= 32 or dtype == torch.float32 else 64
    return Config(scale_first, block_m, 64, block_k)


def packed_matmul(x: torch.Tensor, packed: Packed, fmt: Format) -> torch.Tensor:
    """x [M, K] (float32, float16, bfloat16; contiguous), packed [N, K] -> [M, N] in x's dtype."""
    m, k = x.shape
    n = packed.weight_packed.shape[0]
    if k == 0:
        return x.new_zeros((m, n))
    out = x.new_empty((m, n))
    if out.numel() == 0:
        return out
    config = choose_config(m, fmt, x.dtype)
    dot_dtype = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(x.dtype, tl.float32)
    if INTERPRETED:  # its products of 16-bit tiles are summed in float16, or are of raw bits
        dot_dtype = tl.float32
    zero_point = packed.weight_zero_point
    with device_of(x):
        packed_matmul_kernel[(triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m))](
            x,
            packed.weight_packed,
            packed.weight_scale,
            packed.weight_packed if zero_point is None else zero_point,
            out,
            m,
            n,
            k,
            fmt.packed_bytes(k),
            fmt.groups(k),
            fmt.zero_point_bytes(k),
            CODE=fmt.code,
            dot_dtype=dot_dtype,
            SCALE_FIRST=config.scale_first,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
        )
    return out
