"""Products of MXFP4 weights with activations in e4m3, by the matrix units of sm_90a.

`mixbits.formats.fp8_weights` says what is computed. x is rounded and laid out by one kernel,
multiplied by another; both go to torch's current stream, and nothing waits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.pack import Operand, Packed
from ..formats.schemes import Format
from . import cuda
from .cuda_choice import TILE, KernelChoice, Product, choose_fp8


def why_unavailable(device: torch.device) -> str | None:
    """None where the kernels run on `device`, else one sentence."""
    found = cuda._device(device)
    if found.capability != (9, 0):
        return f"compute capability 9.0 is needed: got {found.capability[0]}.{found.capability[1]}"
    return None if found.has_wgmma else "mixbits._cuda was built without sm_90a"


def explain(x: Tensor, packed: Packed, fmt: Format) -> KernelChoice:
    """How `packed_matmul` multiplies these; print it."""
    tokens, columns = x.shape
    codes = packed.weight_packed
    aligned = codes.data_ptr() % 16 == 0
    product = Product((fmt,), x.dtype, tokens, codes.shape[0], (columns,), aligned)
    return choose_fp8(cuda._device(x.device), product, cuda._forced_kernel())


def packed_matmul(x: Tensor, packed: Packed, fmt: Format, row_scale: Tensor) -> Tensor:
    """x [M, K] times packed e2m1 [N, K] -> [M, N]; x is rounded to e4m3 where that saves time.

    `row_scale` is that of `mixbits.formats.fp8_weights.fold_rows`.
    """
    choice = explain(x, packed, fmt)
    if choice.kernel != "fp8":
        return cuda.packed_matmul(x, Operand.plain(packed, fmt, x.shape[1]), choice)
    native = cuda._native()
    tokens, columns = x.shape
    rows = packed.weight_packed.shape[0]
    codes, scale = quantize_tokens(x)
    out = x.new_empty((tokens, rows))
    weight = cuda.segment(packed, fmt, columns)
    pointers = [t.data_ptr() for t in (row_scale, scale, out)]
    sizes = (tokens, rows, cuda.DTYPE_NUMBERS[x.dtype])
    with torch.cuda.device(x.device):
        native.packed_matmul_e4m3(codes.data_ptr(), weight, *pointers, *sizes, cuda._stream(x))
    return out


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> uint8 and float32 as csrc/cuda/ops.cuh says at `prepare_e4m3`."""
    native = cuda._native()
    tokens, columns = x.shape
    padded = -(-tokens // native.E4M3_TOKENS) * native.E4M3_TOKENS
    shape = (padded, -(-columns // TILE) * TILE)
    codes = torch.empty(shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty(padded, dtype=torch.float32, device=x.device)
    pointers = (x.data_ptr(), codes.data_ptr(), scale.data_ptr())
    sizes = (tokens, columns, cuda.DTYPE_NUMBERS[x.dtype])
    with torch.cuda.device(x.device):
        native.prepare_e4m3(*pointers, *sizes, cuda._stream(x))
    return codes, scale
