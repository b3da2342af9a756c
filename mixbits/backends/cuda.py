"""The CUDA kernels (`mixbits._cuda`, built from csrc/cuda) as a backend.

Memory comes from torch and work goes to torch's current stream, so everything here can be
captured in a CUDA graph: torch's allocator gives a captured graph memory of its own, and the
kernels neither allocate nor wait. `cuda_choice.choose` picks the way in which a matrix product
goes; `explain` tells what it picked, and MIXBITS_CUDA_KERNEL forces one of its kernels.

Weights lie on the device as they lie in the file; nothing is repacked or copied at load. The
ways for few tokens dequantize in registers. For many, the weight is dequantized into a scratch
tensor of bounded size in x's dtype, and torch (cuBLAS) multiplies: the guard of the others.
Values of the weight are rounded to x's dtype in all ways but `simple`, as a model in that dtype
has them.

Arguments are checked, contiguous and on one device; `mixbits.ops` sees to that.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..formats import MX_GROUP, Format, UsageError
from ..pack import Packed, packed_spec
from .cuda_choice import KERNELS, Choice, Kernel, choose

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


@functools.cache
def _device_facts(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors."""
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def _forced_kernel() -> Kernel | None:
    name = os.environ.get("MIXBITS_CUDA_KERNEL") or None
    if name is not None and name not in KERNELS:
        raise UsageError(f"MIXBITS_CUDA_KERNEL must be one of {', '.join(KERNELS)}: got {name!r}")
    return name


def explain(x: Tensor, packed: Packed, fmt: Format) -> Choice:
    """How `packed_matmul` multiplies these; print it."""
    tokens, columns = x.shape
    sizes = (fmt, x.dtype, tokens, packed.weight_packed.shape[0], columns)
    capability, processors = _device_facts(x.device)
    aligned = packed.weight_packed.data_ptr() % 16 == 0
    return choose(capability, *sizes, processors, _native().HAS_WGMMA, aligned, _forced_kernel())


def packed_matmul(
    x: Tensor,
    packed: Packed,
    fmt: Format,
    activation: Format | None,
    choice: Choice | None = None,
) -> Tensor:
    """x [M, K], fake-quantized to `activation` if given, times packed [N, K] -> [M, N].

    `choice` tries a kernel and sizes of one's own, for measurements.
    """
    tokens, columns = x.shape
    rows = packed.weight_packed.shape[0]
    if columns == 0 or tokens == 0 or rows == 0:
        return x.new_zeros((tokens, rows))
    choice = choice or explain(x, packed, fmt)
    if choice.kernel == "wgmma":
        return _matmul_staged(x, packed, fmt, activation, choice)
    if activation is not None:
        x = fake_quantize(x, activation)
    if choice.kernel == "scratch":
        return _matmul_through_scratch(x, packed, fmt)
    if choice.kernel == "mma" and x.data_ptr() % 16:
        x = x.clone()
    out = x.new_empty((tokens, rows))
    pointers = (x.data_ptr(), *_pointers(packed), out.data_ptr())
    sizes = (tokens, rows, columns, DTYPE_NUMBERS[x.dtype], fmt.code)
    with torch.cuda.device(x.device):
        if choice.kernel == "mma":
            shape = (choice.row_tiles, choice.token_tiles, choice.warps)
            _native().packed_matmul_mma(*pointers, *sizes, *shape, _stream(x))
        else:
            _native().packed_matmul(*pointers, *sizes, _stream(x))
    return out


def _matmul_staged(
    x: Tensor, packed: Packed, fmt: Format, activation: Format | None, choice: Choice
) -> Tensor:
    """The product by wgmma; x is fake-quantized while it is staged, M * K * 2 bytes each way."""
    native = _native()
    tokens, columns = x.shape
    rows = packed.weight_packed.shape[0]
    dtype = DTYPE_NUMBERS[x.dtype]
    staged_bytes = native.staged_bytes(tokens, columns, choice.block_tokens)
    staged = torch.empty(staged_bytes, dtype=torch.uint8, device=x.device)
    out = x.new_empty((tokens, rows))
    codes = (fmt.code, 0 if activation is None else activation.code, choice.block_tokens)
    sizes = (tokens, rows, columns, dtype, fmt.code, choice.block_tokens, choice.parts)
    with torch.cuda.device(x.device):
        stream = _stream(x)
        native.stage_activations(
            x.data_ptr(), staged.data_ptr(), tokens, columns, dtype, *codes, stream
        )
        native.packed_matmul_wgmma(
            staged.data_ptr(), *_pointers(packed), out.data_ptr(), *sizes, stream
        )
    return out


def _matmul_through_scratch(x: Tensor, packed: Packed, fmt: Format) -> Tensor:
    """The product for many tokens, over blocks of output rows whose scratch stays bounded."""
    x = x.detach()  # products into a given tensor have no gradient
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
        _dequantize_into(part, packed.rows(slice(first, last)), fmt)
        torch.mm(x, part.T, out=out[:, first:last])
    return out
