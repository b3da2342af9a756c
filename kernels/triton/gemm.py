"""x [M, K] times a packed weight [N, K] transposed; the weight is dequantized in registers.

The weight may be several side by side, segments of columns in formats of their own: a program
walks along one after the other and adds to the same sums, which are rounded once.

Tensor cores multiply in the dtype of x, so the question is where the scale goes:

    MX weights, x bfloat16 or float32   value * 2^e is exact in x's dtype (but for bfloat16's own
                                        subnormals, below 2^-126): scale first, then multiply
    NVFP4                               value * scale has 6 digits, and is exact too: the tensor's
                                        scale divides the sum
    scales of whole rows                values are exact: the row's scale multiplies the sum
    everything else                     codes (or codes minus offset) are exact in float16 and
                                        bfloat16, scaled weights are not: multiply one group of
                                        columns, then scale its float32 sum per output column

so no weight is ever rounded, and sums are float32. float32 inputs are multiplied in IEEE
float32 and not in TF32.

The weight is the left operand: its rows fill the instruction's 64 or 16 rows however few tokens
there are. Where there are too few tiles for a GPU, several programs share the columns of one, and
a second kernel adds their float32 sums in order: the same input gives the same bits.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

import triton
import triton.language as tl
from mixbits.formats.pack import Packed
from mixbits.formats.schemes import Format

from . import INTERPRETED, numerics, tune
from .launch import device_of
from .packed import load_codes, load_scale, load_zero_point, tile_groups

TARGET_PROGRAMS = 256  # about two per multiprocessor of a large GPU
MAX_SPLIT = 8


@triton.jit
def add_segment(
    sums,  # float32 [BLOCK_N, BLOCK_M]
    x_base,  # pointers [BLOCK_M, 1] to the segment's first column of each token
    token_inside,  # [BLOCK_M]
    row,  # int64 [BLOCK_N, 1]
    row_inside,  # [BLOCK_N, 1]
    packed_ptr,  # this and the next seven as in packed_matmul_kernel, of one segment
    scale_ptr,
    zero_ptr,
    divisor_ptr,
    columns,
    packed_bytes,
    groups,
    zero_bytes,
    first_step,
    split_k,
    CODE: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    dot_dtype: tl.constexpr,
):
    """`sums` with the products of every split_k-th tile of columns, from number first_step on."""
    size: tl.constexpr = numerics.group_columns(CODE, BLOCK_K)
    own = tl.zeros_like(sums) if numerics.has_base(CODE) else sums
    for step in range(first_step, tl.cdiv(columns, BLOCK_K), split_k):
        column = step * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_base + column, mask=token_inside[:, None] & (column < columns), other=0.0)
        if dot_dtype == tl.float32:
            x = numerics.to_float32(x)
        codes = load_codes(packed_ptr, row, columns, packed_bytes, step, row_inside, CODE, BLOCK_K)
        group, group_inside = tile_groups(groups, step, row_inside, CODE, BLOCK_K)
        zero_point = load_zero_point(zero_ptr, row, group, groups, zero_bytes, group_inside, CODE)
        codes = tl.reshape(codes, (row.shape[0], BLOCK_K // size, size))
        values = numerics.decode(codes, zero_point[:, :, None], CODE)
        if numerics.scale_kind(CODE) != "float32":
            scale = load_scale(scale_ptr, row, group, groups, group_inside, CODE)
            if SCALE_FIRST:
                values = values * scale[:, :, None]
        w = tl.reshape(values, (row.shape[0], BLOCK_K)).to(dot_dtype)
        if SCALE_FIRST:
            own = tl.dot(w, tl.trans(x), own, input_precision="ieee")
        else:
            part = tl.dot(w, tl.trans(x), input_precision="ieee")
            own += part * tl.reshape(scale, (row.shape[0], 1))
    if numerics.scale_kind(CODE) == "float32":
        own = sums + own * tl.load(scale_ptr + row, mask=row_inside, other=0.0)
    elif numerics.scale_kind(CODE) == "e4m3":
        own, divisor = tl.broadcast(own, tl.load(divisor_ptr))
        own = sums + tl.div_rn(own, divisor)
    return own


@triton.jit(do_not_specialize=["m", "split_k"])  # else compiled anew for every M
def packed_matmul_kernel(
    x_ptr,  # [m, k], contiguous
    packed_ptrs,  # of each segment, uint8 [n, packed_bytes]
    scale_ptrs,  # uint8, float16 or float32 [n, groups]
    zero_ptrs,  # uint8 [n, zero_bytes]; not read for symmetric formats
    divisor_ptrs,  # float32 [1]; read beside scales in e4m3
    out_ptr,  # [m, n], contiguous; float32 [split_k, m, n] where split_k > 1
    m,
    n,
    k,
    split_k,
    columns,  # of each segment, k in all; and the sizes that follow from it
    packed_bytes,
    groups,
    zero_bytes,
    CODES: tl.constexpr,  # of each segment, and so SCALE_FIRST and BLOCK_K
    dot_dtype: tl.constexpr,  # what the tensor cores multiply
    SCALE_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # whole groups; exactly one unless SCALE_FIRST
):
    # Tiles of tokens are neighbours, so that a tile of the weight is read from memory once.
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token_inside = token < m
    x_base = x_ptr + token.to(tl.int64)[:, None] * k
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = (row < n)[:, None]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    split = tl.program_id(2)
    for s in tl.static_range(len(CODES)):
        sums = add_segment(
            sums,
            x_base,
            token_inside,
            row.to(tl.int64)[:, None],
            row_inside,
            packed_ptrs[s],
            scale_ptrs[s],
            zero_ptrs[s],
            divisor_ptrs[s],
            columns[s],
            packed_bytes[s],
            groups[s],
            zero_bytes[s],
            split,
            split_k,
            CODES[s],
            SCALE_FIRST[s],
            BLOCK_K[s],
            dot_dtype,
        )
        x_base += columns[s]
        # Tiles are dealt out as if those of all segments were one row of them.
        taken = tl.cdiv(columns[s], BLOCK_K[s]) % split_k
        split = (split + split_k - taken) % split_k
    part_row = tl.program_id(2).to(tl.int64) * m + token[None, :]
    place = part_row * n + row[:, None]
    out = numerics.from_float32(sums, out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, out, mask=row_inside & token_inside[None, :])


@triton.jit(do_not_specialize=["split_k"])
def sum_splits_kernel(
    partial_ptr,  # float32 [split_k, size]
    out_ptr,  # [size]
    size,
    split_k,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(split_k):
        start = tl.cast(split, tl.int64) * size
        total += tl.load(partial_ptr + start + place, mask=inside, other=0.0)
    tl.store(out_ptr + place, numerics.from_float32(total, out_ptr.dtype.element_ty), mask=inside)


class Config(NamedTuple):
    """Compile-time choices of packed_matmul_kernel, and how it is launched."""

    scale_first: tuple[bool, ...]  # of each segment
    block_m: int
    block_n: int
    block_k: tuple[int, ...]  # of each segment
    split_k: int
    num_warps: int
    num_stages: int


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may have; on a CPU, which interprets, that of an H100."""
    if device.type != "cuda":
        return 227 << 10
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


Segments = tuple[tuple[Format, int], ...]  # formats and columns, side by side


def _scale_first(fmt: Format, dtype: torch.dtype) -> bool:
    """Whether values times their group's scale, if it is not the row's, are exact in `dtype`."""
    return fmt.scale in ("e4m3", "float32") or (fmt.scale == "e8m0" and dtype != torch.float16)


def _config(
    m: int,
    n: int,
    segments: Segments,
    dtype: torch.dtype,
    shared: int,
    tile: tuple[int, int, int],
) -> Config:
    block_n, mx_block_k, stages = tile
    scale_first = tuple(_scale_first(fmt, dtype) for fmt, _ in segments)
    block_k = tuple(
        mx_block_k if first else fmt.group_size
        for first, (fmt, _) in zip(scale_first, segments, strict=True)
    )
    largest = 32 if dtype == torch.float32 else 128
    block_m = next(size for size in (16, 32, 64, 128) if m <= size or size == largest)
    tiles = -(-m // block_m) * -(-n // block_n)
    steps = sum(-(-k // block) for block, (_, k) in zip(block_k, segments, strict=True))
    split = min(-(-TARGET_PROGRAMS // tiles), steps, MAX_SPLIT)
    warps = 8 if block_m * block_n >= 64 * 128 else 4
    for block, (fmt, _) in zip(block_k, segments, strict=True):
        # A stage holds a tile of each operand as it lies in memory; values are exchanged once.
        stage = block * (block_m * dtype.itemsize + block_n * fmt.bits // 8)
        stages = min(stages, max(1, (shared - block_n * block * dtype.itemsize) // stage))
    return Config(scale_first, block_m, block_n, block_k, split, warps, stages)


@functools.lru_cache(4096)
def candidates(
    m: int, n: int, segments: Segments, dtype: torch.dtype, shared: int
) -> tuple[Config, ...]:
    """Tile sizes worth trying, the usual choice first, for `shared` bytes per program. Pure."""
    if dtype == torch.float32:
        # Triton 3.6 multiplies float32 tiles of 64 rows in TF32 on sm_100 whatever is asked for.
        tiles = [(32, 64, 3), (32, 32, 3)]
    elif m <= 32:
        tiles = [(64, 128, 4), (64, 256, 3), (32, 256, 4)]
    else:
        tiles = [(64, 128, 3), (64, 64, 4), (128, 64, 3)]
    configs = (_config(m, n, segments, dtype, shared, tile) for tile in tiles)
    return tuple(dict.fromkeys(configs))


def packed_matmul(
    x: torch.Tensor, parts: Sequence[tuple[Packed, Format, int]], dtype: torch.dtype
) -> torch.Tensor:
    """x [M, K] (float32, float16, bfloat16; contiguous) times packed weights side by side.

    `parts` are those with their formats and columns, [N, K] in all; the result is [M, N] in
    `dtype`, each sum rounded once.
    """
    m, k = x.shape
    n = parts[0][0].weight_packed.shape[0]
    out = x.new_empty((m, n), dtype=dtype)
    if k == 0:
        return out.zero_()
    if out.numel() == 0:
        return out
    segments = tuple((fmt, columns) for _, fmt, columns in parts)
    kind = " ".join(f"{fmt.code} {n}x{columns}" for fmt, columns in segments)
    with device_of(x):
        config = tune.choose(
            f"gemm {kind} {x.dtype} m{triton.next_power_of_2(m)}",
            candidates(m, n, segments, x.dtype, shared_bytes(x.device)),
            lambda config: _launch(x, parts, out, config),
        )
        _launch(x, parts, out, config)
    return out


def _launch(
    x: torch.Tensor,
    parts: Sequence[tuple[Packed, Format, int]],
    out: torch.Tensor,
    config: Config,
) -> None:
    (m, k), n = x.shape, out.shape[1]
    dot_dtype = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(x.dtype, tl.float32)
    if INTERPRETED:  # its products of 16-bit tiles are summed in float16, or are of raw bits
        dot_dtype = tl.float32
    weights = [packed for packed, _, _ in parts]
    split = config.split_k
    target = out if split == 1 else out.new_empty((split, m, n), dtype=torch.float32)
    grid = (triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n), split)
    packed_matmul_kernel[grid](
        x,
        tuple(w.weight_packed for w in weights),
        tuple(w.weight_scale for w in weights),
        tuple(w.weight_packed if (z := w.weight_zero_point) is None else z for w in weights),
        tuple(w.weight_scale if (d := w.weight_global_scale) is None else d for w in weights),
        target,
        m,
        n,
        k,
        split,
        tuple(columns for _, _, columns in parts),
        tuple(fmt.packed_bytes(columns) for _, fmt, columns in parts),
        tuple(fmt.groups(columns) for _, fmt, columns in parts),
        tuple(fmt.zero_point_bytes(columns) for _, fmt, columns in parts),
        CODES=tuple(fmt.code for _, fmt, _ in parts),
        dot_dtype=dot_dtype,
        SCALE_FIRST=config.scale_first,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if split > 1:
        block = 1024
        grid = (triton.cdiv(m * n, block), 1, 1)
        sum_splits_kernel[grid](target, out, m * n, split, BLOCK=block)
