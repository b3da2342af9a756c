"""The CUDA kernels (`mixbits._cuda`, built from csrc/cuda) as a backend.

Memory comes from torch and work goes to torch's current stream, so everything here can be
captured in a CUDA graph. The matrix product has two ways:

    up to 16 tokens   our kernel: the weight is read packed and dequantized in registers
    more              the weight is dequantized into a scratch tensor of bounded size, in x's
                      dtype, and torch (cuBLAS) multiplies; dequantizing costs about as much as
                      reading the weight once in 16 bits

The second rounds scaled integers to x's dtype, as a model in that dtype does. It is the guard of
whatever replaces it: no kernel for many tokens needs to be slower.

Arguments are checked, contiguous and on one device; `mixbits.ops` sees to that.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..formats import MX_GROUP, Format
from ..pack import Packed, packed_spec

DTYPE_NUMBERS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # csrc/formats.h, Dtype
SCRATCH_BYTES = 64 << 20


@functools.cache
def _native() -> Any:
    """The module mixbits._cuda; ImportError where it was not built."""
    return importlib.import_module("mixbits._cuda")


@functools.cache
def why_unavailable() -> str | None:
    """None when the backend can be used, else one sentence that says why not."""
    try:
        native = _native()
    except ModuleNotFoundError:
        return "not built: install with MIXBITS_CUDA=1 where nvcc is on the PATH"
    except ImportError as error:
        return f"mixbits._cuda cannot be loaded: {error}"
    if not torch.cuda.is_available():
        return "no CUDA device"
    torch.cuda.init()
    reason = native.why_unusable()
    return None if reason is None else f"the CUDA kernels do not run on this device: {reason}"


def supports(device: torch.device) -> bool:
    """Whether tensors on `device` can be handled."""
    return device.type == "cuda" and why_unavailable() is None


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _pointers(packed: Packed) -> tuple[int, int, int]:
    codes, scale, zero_point = packed
    return _pointer(codes), _pointer(scale), _pointer(zero_point)


def fake_quantize(x: Tensor, fmt: Format) -> Tensor:
    """Round trip of x [..., K] through codes, in x's own dtype."""
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    columns = x.shape[-1]
    sizes = (x.numel() // columns, columns, DTYPE_NUMBERS[x.dtype], fmt.code)
    with torch.cuda.device(x.device):
        _native().fake_quantize(x.data_ptr(), out.data_ptr(), *sizes, _stream(x))
    return out


def quantize_pack(weight: Tensor, fmt: Format) -> Packed:
    """weight [N, K] -> the tensors of `mixbits.pack`."""
    rows, columns = weight.shape
    specs = packed_spec(fmt, rows, columns).values()
    packed = Packed(
        *(torch.empty(shape, dtype=dtype, device=weight.device) for dtype, shape in specs)
    )
    if weight.numel() == 0:
        return packed
    sizes = (rows, columns, DTYPE_NUMBERS[weight.dtype], fmt.code)
    with torch.cuda.device(weight.device):
        _native().quantize_pack(weight.data_ptr(), *_pointers(packed), *sizes, _stream(weight))
    return packed


def _dequantize_into(out: Tensor, packed: Packed, fmt: Format) -> None:
    rows, columns = out.shape
    if out.numel() == 0:
        return
    sizes = (rows, columns, DTYPE_NUMBERS[out.dtype], fmt.code)
    with torch.cuda.device(out.device):
        _native().dequantize(*_pointers(packed), out.data_ptr(), *sizes, _stream(out))


def dequantize(packed: Packed, fmt: Format, in_features: int, dtype: torch.dtype) -> Tensor:
    """Packed [N, K] -> [N, K] in `dtype`; `in_features` is K."""
    codes = packed.weight_packed
    out = torch.empty((codes.shape[0], in_features), dtype=dtype, device=codes.device)
    _dequantize_into(out, packed, fmt)
    return out


def _statistics(
    weight: Tensor, vectors: tuple[Tensor, Tensor] | None, gradient: Tensor | None, codes: list[int]
) -> Tensor:
    """float64 [formats, slabs], in as many passes over the weight as the kernel's limit asks."""
    native = _native()
    rows, columns = weight.shape
    slabs = -(-columns // MX_GROUP)
    out = torch.zeros((len(codes), slabs), dtype=torch.float64, device=weight.device)
    if weight.numel() == 0:
        return out
    inputs = (weight, *(vectors or (None, None)), gradient)
    gradient_dtype = DTYPE_NUMBERS[weight.dtype if gradient is None else gradient.dtype]
    sizes = (rows, columns, DTYPE_NUMBERS[weight.dtype], gradient_dtype)
    blocks = native.statistics_row_blocks(rows, columns)
    with torch.cuda.device(weight.device):
        for first in range(0, len(codes), native.MAX_FORMATS):
            part = codes[first : first + native.MAX_FORMATS]
            workspace = out.new_empty((blocks, len(part), slabs))
            target = out[first : first + len(part)]
            pointers = (workspace.data_ptr(), target.data_ptr())
            native.statistics(*map(_pointer, inputs), part, *pointers, *sizes, _stream(weight))
    return out


def fisher_statistics(
    weight: Tensor, row_weight: Tensor, column_weight: Tensor, formats: Sequence[Format]
) -> Tensor:
    """float64 [formats, ceil(K / 32)], as `mixbits.reference.fisher_statistics`."""
    vectors = (row_weight.double().contiguous(), column_weight.double().contiguous())
    return _statistics(weight, vectors, None, [fmt.code for fmt in formats])


def gradient_statistics(weight: Tensor, gradient: Tensor, formats: Sequence[Format]) -> Tensor:
    """float64 [formats, ceil(K / 32)], as `mixbits.reference.gradient_statistics`."""
    return _statistics(weight, None, gradient, [fmt.code for fmt in formats])


def packed_matmul(x: Tensor, packed: Packed, fmt: Format, activation: Format | None) -> Tensor:
    """x [M, K], fake-quantized to `activation` if given, times packed [N, K] -> [M, N]."""
    if activation is not None:
        x = fake_quantize(x, activation)
    tokens, columns = x.shape
    rows = packed.weight_packed.shape[0]
    if columns == 0 or tokens == 0 or rows == 0:
        return x.new_zeros((tokens, rows))
    native = _native()
    if tokens > native.MAX_TOKENS:
        return _matmul_through_scratch(x, packed, fmt)
    out = x.new_empty((tokens, rows))
    sizes = (tokens, rows, columns, DTYPE_NUMBERS[x.dtype], fmt.code)
    with torch.cuda.device(x.device):
        native.packed_matmul(x.data_ptr(), *_pointers(packed), out.data_ptr(), *sizes, _stream(x))
    return out


def _row_slice(packed: Packed, first: int, last: int) -> Packed:
    zero_point = packed.weight_zero_point
    return Packed(
        packed.weight_packed[first:last],
        packed.weight_scale[first:last],
        None if zero_point is None else zero_point[first:last],
    )


def _matmul_through_scratch(x: Tensor, packed: Packed, fmt: Format) -> Tensor:
    """The product for many tokens, over blocks of output rows whose scratch stays bounded."""
    tokens, columns = x.shape
    rows = packed.weight_packed.shape[0]
    block = min(rows, max(1, SCRATCH_BYTES // (columns * x.element_size())))
    scratch = x.new_empty((block, columns))
    if block == rows:
        _dequantize_into(scratch, packed, fmt)
        return x @ scratch.T
    out = x.new_empty((tokens, rows))
    for first in range(0, rows, block):
        last = min(first + block, rows)
        part = scratch[: last - first]
        _dequantize_into(part, _row_slice(packed, first, last), fmt)
        out[:, first:last] = x @ part.T
    return out
