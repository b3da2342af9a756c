"""The Triton kernels (`mixbits.kernels`) as a backend: any GPU that Triton compiles for.

With TRITON_INTERPRET=1 in the environment they run on CPU tensors instead, one program after
the other in numpy: slow, and meant for tests on machines without a GPU.

Arguments are checked, contiguous and on one device; `mixbits.ops` sees to that.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..formats.pack import Operand, Packed, Piece
from ..formats.schemes import NATIVE_FORMATS, Format
from .scratch import matmul_through_scratch

TAKES_PARTS = True  # `packed_matmul`, of regular operands
# Beyond, every tile of tokens would decode the weight once more; decoding it once is cheaper.
MAX_FUSED_TOKENS = 256
HELD = NATIVE_FORMATS  # kernels/triton/numerics.py


@functools.cache
def _interpreted() -> bool:
    return bool(importlib.import_module("mixbits.kernels").INTERPRETED)


def _kernels(name: str) -> Any:
    """The module mixbits.kernels.<name>, imported on first use: it needs Triton."""
    return importlib.import_module(f"mixbits.kernels.{name}")


@functools.cache
def why_unavailable() -> str | None:
    """None when the backend can be used, else one sentence that says why not."""
    try:
        interpreted = _interpreted()
    except ImportError as error:
        if error.name and error.name.split(".")[0] == "triton":
            return "triton is not installed"
        return f"mixbits.kernels cannot be imported: {error}"
    if interpreted or torch.cuda.is_available():
        return None
    return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"


def supports(device: torch.device) -> bool:
    """Whether tensors on `device` can be handled."""
    if why_unavailable() is not None:
        return False
    return device.type == ("cpu" if _interpreted() else "cuda")


def holds(fmt: Format) -> bool:
    """Whether operations have code for `fmt`."""
    return (fmt.element, fmt.scale) in HELD


def fake_quantize(x: Tensor, fmt: Format) -> Tensor:
    """Round trip of x [..., K] through codes, in x's own dtype."""
    return _kernels("fake_quant").fake_quantize(x, fmt)


def quantize_pack(weight: Tensor, fmt: Format) -> Packed:
    """weight [N, K] -> the tensors of `mixbits.formats.pack`."""
    return _kernels("pack").quantize_pack(weight, fmt)


def dequantize(packed: Packed, fmt: Format, in_features: int, dtype: torch.dtype) -> Tensor:
    """Packed [N, K] -> [N, K] in `dtype`; `in_features` is K."""
    return _kernels("dequantize").dequantize(packed, fmt, in_features, dtype)


def fisher_statistics(
    weight: Tensor, row_weight: Tensor, column_weight: Tensor, formats: Sequence[Format]
) -> Tensor:
    """float64 [formats, ceil(K / 32)], as `mixbits.formats.reference.fisher_statistics`."""
    return _kernels("statistics").fisher_statistics(weight, row_weight, column_weight, formats)


def gradient_statistics(weight: Tensor, gradient: Tensor, formats: Sequence[Format]) -> Tensor:
    """float64 [formats, ceil(K / 32)], as `mixbits.formats.reference.gradient_statistics`."""
    return _kernels("statistics").gradient_statistics(weight, gradient, formats)


def square_sums(x: Tensor, formats: Sequence[Format]) -> Tensor:
    """float64 [1 + formats, K], as `mixbits.formats.reference.square_sums`."""
    return _kernels("statistics").square_sums(x, formats)


def packed_matmul(x: Tensor, operand: Operand) -> Tensor:
    """x [M, K] times a regular operand [N, K] -> [M, N]."""
    activation = operand.parts[0].activation
    if operand.is_plain and activation is not None:
        arranged = fake_quantize(x, activation)
    else:
        arranged = _kernels("arrange").arrange(x, operand, operand.input_dtype(x.dtype))
    return _product(arranged, operand.pieces, x.dtype)


def _product(x: Tensor, pieces: Sequence[Piece], dtype: torch.dtype) -> Tensor:
    if x.shape[0] > MAX_FUSED_TOKENS and x.numel():
        return matmul_through_scratch(x, pieces, dtype, _kernels("dequantize").dequantize_into)
    return _kernels("gemm").packed_matmul(x, pieces, dtype)


def explain_matmul(fmt: Format, m: int, n: int, k: int, dtype: torch.dtype) -> str:
    """Which way `packed_matmul` takes for x [m, k] of `dtype` and a weight [n, k]."""
    if m > MAX_FUSED_TOKENS:
        return "dequantize, then torch"
    gemm = _kernels("gemm")
    device = torch.device("cpu" if _interpreted() else f"cuda:{torch.cuda.current_device()}")
    config = gemm.candidates(m, n, ((fmt, k),), dtype, gemm.shared_bytes(device))[0]
    tile = f"{config.block_n}x{config.block_m}x{config.block_k[0]}"
    return f"fused, tiles N x M x K of {tile}, K in {config.split_k}"
