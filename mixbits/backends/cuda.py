"""The CUDA kernels (`mixbits._cuda`, built from csrc/cuda) as a backend.

Memory comes from torch and work goes to torch's current stream, so everything here can be
captured in a CUDA graph: torch's allocator gives a captured graph memory of its own, and the
kernels neither allocate nor wait. `cuda_choice.choose` picks the way in which a matrix product
goes; `explain` tells what it picked, and MIXBITS_CUDA_KERNEL forces one of its kernels.

Weights lie on the device as they lie in the file; nothing is repacked or copied at load. The
ways for few tokens dequantize in registers. For many, the weight is dequantized into a scratch
tensor of bounded size in x's dtype, and torch (cuBLAS) multiplies: the guard of the others.
A linear of several segments goes each of these ways as one product: x is put in order, rotated
and fake-quantized in one pass, and one kernel adds up the products of all segments. That of a
single segment is compiled for its format alone, and comes in more sizes.
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

from ..errors import UsageError
from ..formats.pack import Operand, Packed, empty_packed
from ..formats.schemes import FIRST_FORMATS, MX_GROUP, NATIVE_FORMATS, Format
from .cuda_choice import KERNELS, TILE, Device, Kernel, KernelChoice, Product, choose
from .scratch import matmul_through_scratch

TAKES_PARTS = True  # `packed_matmul`, of regular operands
DECODED = NATIVE_FORMATS  # `Decoded` in csrc/cuda/codes/common.cuh
DTYPE_NUMBERS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # csrc/formats.h, Dtype


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


def holds(fmt: Format) -> bool:
    """Whether operations have code for `fmt`."""
    return (fmt.element, fmt.scale) in FIRST_FORMATS


def decodes(fmt: Format) -> bool:
    """Whether packed weights in `fmt` can be dequantized, and so multiplied."""
    return (fmt.element, fmt.scale) in DECODED


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def segment(packed: Packed, fmt: Format, columns: int, activation: Format | None = None) -> Any:
    """A packed weight [N, columns] as native code is given it: addresses by name."""
    addresses = {name: _pointer(tensor) for name, tensor in packed._asdict().items()}
    rounding = 0 if activation is None else activation.code
    return _native().Segment(**addresses, columns=columns, format=fmt.code, activation=rounding)


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
    """weight [N, K] -> the tensors of `mixbits.formats.pack`."""
    rows, columns = weight.shape
    packed = empty_packed(fmt, rows, columns, weight.device)
    if weight.numel() == 0:
        return packed
    named = packed.weight_packed, packed.weight_scale, packed.weight_zero_point
    sizes = (rows, columns, DTYPE_NUMBERS[weight.dtype], fmt.code)
    with torch.cuda.device(weight.device):
        _native().quantize_pack(weight.data_ptr(), *map(_pointer, named), *sizes, _stream(weight))
    return packed


def _dequantize_into(out: Tensor, packed: Packed, fmt: Format) -> None:
    """Packed [N, K] -> out [N, K], whose rows may be parts of longer ones."""
    if out.numel() == 0:
        return
    rows, columns = out.shape
    sizes = (rows, out.stride(0), DTYPE_NUMBERS[out.dtype])
    with torch.cuda.device(out.device):
        weight = segment(packed, fmt, columns)
        _native().dequantize(weight, out.data_ptr(), *sizes, _stream(out))


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
    """float64 [formats, ceil(K / 32)], as `mixbits.formats.reference.fisher_statistics`."""
    vectors = (row_weight.double().contiguous(), column_weight.double().contiguous())
    return _statistics(weight, vectors, None, [fmt.code for fmt in formats])


def gradient_statistics(weight: Tensor, gradient: Tensor, formats: Sequence[Format]) -> Tensor:
    """float64 [formats, ceil(K / 32)], as `mixbits.formats.reference.gradient_statistics`."""
    return _statistics(weight, None, gradient, [fmt.code for fmt in formats])


@functools.cache
def _device(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return Device(capability, properties.multi_processor_count, _native().HAS_WGMMA)


def _forced_kernel() -> Kernel | None:
    name = os.environ.get("MIXBITS_CUDA_KERNEL") or None
    if name is not None and name not in KERNELS:
        raise UsageError(f"MIXBITS_CUDA_KERNEL must be one of {', '.join(KERNELS)}: got {name!r}")
    return name


def explain(x: Tensor, operand: Operand) -> KernelChoice:
    """How `packed_matmul` multiplies these; print it."""
    formats = tuple(part.format for part in operand.parts)
    aligned = all(part.packed.weight_packed.data_ptr() % 16 == 0 for part in operand.parts)
    sizes = (x.shape[0], operand.out_features, operand.columns)
    product = Product(formats, operand.input_dtype(x.dtype), *sizes, aligned)
    return choose(_device(x.device), product, _forced_kernel())


def explain_matmul(fmt: Format, m: int, n: int, k: int, dtype: torch.dtype) -> str:
    """Which way `packed_matmul` takes for x [m, k] of `dtype` and a weight [n, k]."""
    device = torch.device("cuda", torch.cuda.current_device())
    return str(choose(_device(device), Product((fmt,), dtype, m, n, (k,)), _forced_kernel()))


def _segments(operand: Operand) -> list[Any]:
    return [
        segment(packed, fmt, columns, activation)
        for (packed, fmt, activation), columns in zip(operand.parts, operand.columns, strict=True)
    ]


def _prepare_activations(
    x: Tensor, operand: Operand, dtype: torch.dtype, block_tokens: int = 0
) -> Tensor:
    """x [M, K] as `operand` multiplies it, in one pass: rows of `dtype`, or what wgmma reads."""
    native = _native()
    tokens, columns = x.shape
    if block_tokens == 0:
        if operand.takes_input_as_is and x.data_ptr() % 16 == 0:
            return x
        if operand.is_plain and (activation := operand.parts[0].activation) is not None:
            return fake_quantize(x, activation)
        prepared = x.new_empty((tokens, columns), dtype=dtype)
    else:
        padded = sum(-(-width // TILE) * TILE for width in operand.columns)
        size = native.prepared_bytes(tokens, padded, block_tokens)
        prepared = torch.empty(size, dtype=torch.uint8, device=x.device)
    place = operand.order
    order = (0, 0) if place is None else (place.data_ptr(), place.element_size())
    pointers = (x.data_ptr(), prepared.data_ptr(), *order, operand.rotated, _segments(operand))
    sizes = (tokens, columns, DTYPE_NUMBERS[x.dtype], DTYPE_NUMBERS[dtype], block_tokens)
    with torch.cuda.device(x.device):
        native.prepare_activations(*pointers, *sizes, _stream(x))
    return prepared


def packed_matmul(x: Tensor, operand: Operand, choice: KernelChoice | None = None) -> Tensor:
    """x [M, K] times a regular operand [N, K] -> [M, N], whose sums are rounded once.

    `choice` tries a kernel and sizes of one's own, for measurements.
    """
    tokens, columns = x.shape
    rows = operand.out_features
    if columns == 0 or tokens == 0 or rows == 0:
        return x.new_zeros((tokens, rows))
    choice = choice or explain(x, operand)
    dtype = operand.input_dtype(x.dtype)
    prepared = _prepare_activations(x, operand, dtype, choice.block_tokens)
    if choice.kernel == "scratch":
        return matmul_through_scratch(prepared, operand.pieces, x.dtype, _dequantize_into)
    if choice.kernel == "simple" and len(operand.parts) > 1:
        prepared = torch.cat([piece.flatten() for piece in prepared.split(operand.columns, 1)])
    out = x.new_empty((tokens, rows), dtype=dtype)
    pointers = (prepared.data_ptr(), _segments(operand), out.data_ptr())
    sizes = (tokens, rows, columns, DTYPE_NUMBERS[dtype])
    with torch.cuda.device(x.device):
        if choice.kernel == "mma":
            shape = (choice.row_tiles, choice.token_tiles, choice.warps)
            _native().packed_matmul_mma(*pointers, *sizes, *shape, _stream(x))
        elif choice.kernel == "wgmma":
            blocks = (choice.block_tokens, choice.parts)
            _native().packed_matmul_wgmma(*pointers, *sizes, *blocks, _stream(x))
        else:
            sums = torch.empty_like(out, dtype=torch.float32) if len(operand.parts) > 1 else None
            _native().packed_matmul(*pointers, *sizes, _pointer(sums), _stream(x))
    return out.to(x.dtype)
