"""Which CUDA kernel multiplies: a pure function of the device and the product.

    kernel      weights                                   for
    simple      fp32 FMA in registers                     float32, or rows without 16-byte pieces;
                                                          at most 16 tokens
    mma         mma.sync, dequantized in registers        few tokens, sm_80 and later
    wgmma       warpgroup mma, dequantized in registers   up to 1024 tokens on sm_90
    scratch     dequantized to memory, then cuBLAS        everything else: the guard
    fp8         warpgroup mma, folded to e4m3             MXFP4 and many tokens on sm_90, where
                                                          activations may be rounded to e4m3

Weights in NVFP4 have simple and, where they are the only segment, mma; those in other formats than
the first have scratch. The boundaries follow from bytes and instructions (comments below); none has
been measured yet.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch

from ..formats.fp8_weights import can_fold
from ..formats.schemes import FIRST_FORMATS, INTEGERS, Format

Kernel = Literal["simple", "mma", "wgmma", "scratch", "fp8"]
# Those that may be forced; fp8 rounds activations, and must be allowed instead.
KERNELS: tuple[Kernel, ...] = ("simple", "mma", "wgmma", "scratch")

SIMPLE_TOKENS = 16  # csrc/cuda/ops.cuh, kMaxTokens
WGMMA_ROWS = 128  # of a block, csrc/cuda/matmul/wgmma.cu
MIXED_TOKENS = 128  # the one size of its blocks for weights in segments, csrc/cuda/ops.cuh
TILE = 128  # columns that a block of either kernel takes at a time
FP8_TOKENS = 128  # of a block, csrc/cuda/matmul/e4m3.cu; it has WGMMA_ROWS too


@dataclass(frozen=True)
class KernelChoice:
    """A kernel and its sizes; what a kernel does not have is 0. `str()` prints it.

    `row_tiles` (of 16 rows), `token_tiles` (of 8 tokens) and `warps` belong to mma;
    `block_tokens` and `parts` (blocks that split the columns) to wgmma, `block_tokens` to fp8.
    """

    kernel: Kernel
    row_tiles: int = 0
    token_tiles: int = 0
    warps: int = 0
    block_tokens: int = 0
    parts: int = 0

    def __str__(self) -> str:
        sizes = {
            "simple": "fp32 arithmetic",
            "scratch": "dequantized, then cuBLAS",
            "mma": f"{16 * self.row_tiles} rows x {8 * self.token_tiles} tokens, "
            f"{self.warps} warps along K",
            "wgmma": f"{WGMMA_ROWS} rows x {self.block_tokens} tokens, {self.parts} blocks along K",
            "fp8": f"{WGMMA_ROWS} rows x {self.block_tokens} tokens, activations in e4m3",
        }
        return f"{self.kernel} ({sizes[self.kernel]})"


@dataclass(frozen=True)
class Device:
    """What a choice depends on of a GPU, and of the library that was built for it.

    `processors` is the number of its multiprocessors; `has_wgmma` whether the library was built for
    sm_90a.
    """

    capability: tuple[int, int]
    processors: int = 132
    has_wgmma: bool = True


@dataclass(frozen=True)
class Product:
    """x [tokens, K] times a weight [rows, K] in segments of `formats`.

    `columns` are those of each segment, K in all; `dtype` is that of x once it is in order, rotated
    and rounded; `aligned` says whether all codes begin at a multiple of 16 bytes.
    """

    formats: tuple[Format, ...]
    dtype: torch.dtype
    tokens: int
    rows: int
    columns: tuple[int, ...]
    aligned: bool = True

    @property
    def fits_matrix_units(self) -> bool:
        """Whether its dtype is theirs, and rows of codes are chunks that one load brings.

        csrc/cuda/codes/fragments.h has the chunks.
        """
        whole = all(width % 32 == 0 for width in self.columns)
        return self.dtype in (torch.bfloat16, torch.float16) and whole and self.aligned


@functools.cache
def choose_fp8(device: Device, product: Product, forced: Kernel | None = None) -> KernelChoice:
    """`choose` for one segment where activations may be e4m3 and the weight fits.

    Which weights do is said by `formats.fp8_weights`.
    """
    (fmt,) = product.formats
    possible = product.fits_matrix_units and can_fold(fmt) and _has_wgmma(device)
    # With few tokens the cost is that of reading the weight, which fp8 reads like the others. Its
    # blocks take half as long as those of wgmma, but do not split the columns to fill the device.
    blocks = -(-product.rows // WGMMA_ROWS) * -(-product.tokens // FP8_TOKENS)
    gains = product.tokens > FP8_TOKENS and 2 * blocks >= device.processors
    if forced is None and possible and gains:
        return KernelChoice("fp8", block_tokens=FP8_TOKENS)
    return choose(device, product, forced)


def _has_wgmma(device: Device) -> bool:
    return device.capability == (9, 0) and device.has_wgmma


def _mma(tokens: int, columns: int, segments: int) -> KernelChoice:
    # A block reads x once per 16 * row_tiles rows: x must stay below the weight's own bytes, so
    # more tokens need more rows; few rows leave multiprocessors idle, so one token takes 16.
    row_tiles, token_tiles = (1, 1) if tokens <= 2 else (4, 1) if tokens <= 8 else (4, 2)
    if segments > 1:
        token_tiles = 1  # the only ones there are for weights in segments
    most = 16 if row_tiles == 1 else 12 if token_tiles == 1 else 8  # max_warps, mma.cu
    # A warp wants at least two tiles of its rows; fewer than 4 warps leave the SM's parts idle.
    warps = max(4, segments, min(most, -(-columns // TILE) // 2))
    return KernelChoice("mma", row_tiles=row_tiles, token_tiles=token_tiles, warps=warps)


def _wgmma(tokens: int, rows: int, columns: int, segments: int, processors: int) -> KernelChoice:
    block_tokens = 64 if tokens <= 64 else 128 if tokens <= 128 else 256
    if segments > 1:
        block_tokens = MIXED_TOKENS
    elif tokens > 256 and -(-tokens // 128) * 128 < -(-tokens // 256) * 256:
        block_tokens = 128  # less padding
    blocks = -(-rows // WGMMA_ROWS) * -(-tokens // block_tokens)
    # Split the columns while that fills idle multiprocessors and leaves each part 4 tiles.
    parts = 1
    while parts < 8 and 2 * parts * blocks <= processors and columns >= 2 * parts * 4 * TILE:
        parts *= 2
    return KernelChoice("wgmma", block_tokens=block_tokens, parts=parts)


@functools.cache
def choose(device: Device, product: Product, forced: Kernel | None = None) -> KernelChoice:
    """The kernel for a product on a device.

    `forced` names a kernel; raises ValueError where that cannot run.
    """
    tokens, segments, columns = product.tokens, len(product.formats), sum(product.columns)
    kinds = {(fmt.element, fmt.scale) for fmt in product.formats}
    elements = {element for element, _ in kinds}
    first = kinds <= FIRST_FORMATS
    few_tokens = kinds <= FIRST_FORMATS | {("e2m1", "e4m3")}  # csrc/cuda/codes/common.cuh
    # What one kernel for several segments has code for, csrc/cuda/matmul/wgmma.cu.
    family = elements <= {"e2m1", "e4m3"} or elements <= set(INTEGERS)
    fits = product.fits_matrix_units
    possible: dict[Kernel, bool] = {
        "simple": few_tokens and tokens <= SIMPLE_TOKENS,
        "mma": fits and (first or (few_tokens and segments == 1)) and device.capability >= (8, 0),
        "wgmma": fits and first and (family or segments == 1) and _has_wgmma(device),
        "scratch": True,
    }
    # mma pays for the weight once per 16 tokens (8 for several segments), and dequantizes it as
    # often: about 4 instructions per weight, against the 2 bytes written and read again that
    # scratch costs.
    few = 16 if possible["wgmma"] else 64 if segments == 1 else 32
    # From about 1024 tokens on, dequantizing once is less than 1/10 of the product's own time.
    limits: dict[Kernel, int] = {"mma": few, "simple": SIMPLE_TOKENS, "wgmma": 1024}
    names = "+".join(fmt.element for fmt in product.formats)
    what = f"{product.dtype} with {names} weights [{product.rows}, {columns}]"
    kernel = _first(possible, limits, tokens, forced, f"{what} on {_name(device.capability)}")
    if kernel == "mma":
        return _mma(tokens, columns, segments)
    if kernel == "wgmma":
        return _wgmma(tokens, product.rows, columns, segments, device.processors)
    return KernelChoice(kernel)


def _name(capability: tuple[int, int]) -> str:
    return f"compute capability {capability[0]}.{capability[1]}"


def _first(
    possible: dict[Kernel, bool],
    limits: dict[Kernel, int],  # numbers of tokens, in the order of preference
    tokens: int,
    forced: Kernel | None,
    what: str,
) -> Kernel:
    """`forced`, or the first kernel that takes so many tokens. Raises ValueError, with `what`."""
    if forced is None:
        some = (name for name, most in limits.items() if possible[name] and tokens <= most)
        return next(some, "scratch")
    if not possible[forced]:
        raise ValueError(f"kernel {forced!r} cannot take {tokens} tokens of {what}")
    return forced
