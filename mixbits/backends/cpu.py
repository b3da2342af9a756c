"""The native CPU library (`mixbits._cpu`, built from csrc/cpu) as a backend.

It holds the same code for several instruction sets and runs the best that this CPU has; the
environment variable MIXBITS_ISA, or `set_isa`, forces one. Its threads are torch's: both use the
one OpenMP runtime of the process, so `torch.set_num_threads` rules them too.

Arguments are checked and contiguous; `mixbits.ops` sees to that.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..formats import compensate
from ..formats.compensate import Group
from ..formats.pack import SCALE_DTYPES, Operand, Packed, empty_packed
from ..formats.reference import Scales
from ..formats.schemes import MX_GROUP, NATIVE_FORMATS, ROW, Format

DTYPE_NUMBERS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # csrc/formats.h, Dtype

MAX_COLUMNS = 128  # of one call of compensate_group: csrc/cpu/ops/compensate.cpp
HELD = NATIVE_FORMATS  # csrc/cpu/codes/group.h

_native: Any = None
_why: str | None = None
try:  # torch comes first: the library then finds torch's OpenMP already loaded
    from .. import _cpu as _loaded

    _native = _loaded
except ModuleNotFoundError:
    _why = "mixbits._cpu was not built (it needs a C++17 compiler when mixbits is installed)"
except ImportError as error:
    _why = f"mixbits._cpu cannot be loaded: {error}"


def why_unavailable() -> str | None:
    """None when the backend can be used, else one sentence that says why not."""
    return _why


def supports(device: torch.device) -> bool:
    """Whether tensors on `device` can be handled."""
    return device.type == "cpu" and _why is None


def holds(fmt: Format) -> bool:
    """Whether operations have code for `fmt`."""
    return (fmt.element, fmt.scale) in HELD


def isa() -> str:
    """The name of the instruction set in use."""
    return str(_native.isa())


def available_isas() -> list[str]:
    """Names of the instruction sets that this CPU can run, best first; none without library."""
    return [] if _native is None else list(_native.available_isas())


def set_isa(name: str) -> None:
    """Use this instruction set from now on. Raises UsageError that names those there are."""
    try:
        _native.set_isa(name)
    except ValueError as error:
        raise UsageError(str(error)) from error


if _native is not None and os.environ.get("MIXBITS_ISA"):
    set_isa(os.environ["MIXBITS_ISA"])


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy, at a multiple of its elements' size: what is read number by number must be."""
    return x if x.data_ptr() % x.element_size() == 0 else x.clone()


def _pointers(packed: Packed) -> tuple[int, int, int]:
    zero_point = packed.weight_zero_point
    pointer = 0 if zero_point is None else zero_point.data_ptr()
    return packed.weight_packed.data_ptr(), packed.weight_scale.data_ptr(), pointer


def _divisor(packed: Packed) -> int:
    """The address of the tensor's scale, or 0."""
    scale = packed.weight_global_scale
    return 0 if scale is None else scale.data_ptr()


def sum_words(data: Tensor) -> int:
    """Sum of the int64 elements of `data`, modulo 2^64: reads memory as fast as it can be read."""
    return int(_native.sum_words(data.data_ptr(), data.nbytes))


def fake_quantize(x: Tensor, fmt: Format) -> Tensor:
    """Round trip of x [..., K] through codes, in x's own dtype."""
    out = torch.empty_like(x)
    columns = x.shape[-1]
    rows = x.numel() // columns
    _native.fake_quantize(
        x.data_ptr(), out.data_ptr(), rows, columns, DTYPE_NUMBERS[x.dtype], fmt.code
    )
    return out


def quantize_pack(weight: Tensor, fmt: Format) -> Packed:
    """weight [N, K] -> the tensors of `mixbits.formats.pack`."""
    rows, columns = weight.shape
    packed = empty_packed(fmt, rows, columns)
    dtype = DTYPE_NUMBERS[weight.dtype]
    pointers = (weight.data_ptr(), *_pointers(packed), _divisor(packed))
    _native.quantize_pack(*pointers, rows, columns, dtype, fmt.code)
    return packed


def dequantize(packed: Packed, fmt: Format, in_features: int, dtype: torch.dtype) -> Tensor:
    """Packed [N, K] -> [N, K] in `dtype`; `in_features` is K."""
    rows = packed.weight_packed.shape[0]
    out = torch.empty((rows, in_features), dtype=dtype)
    sizes = (rows, in_features, DTYPE_NUMBERS[dtype], fmt.code)
    _native.dequantize(*_pointers(packed), _divisor(packed), out.data_ptr(), *sizes)
    return out


def _slab_sums(weight: Tensor, formats: Sequence[Format]) -> Tensor:
    shape = (len(formats), -(-weight.shape[1] // MX_GROUP))
    return torch.empty(shape, dtype=torch.float64)


def fisher_statistics(
    weight: Tensor, row_weight: Tensor, column_weight: Tensor, formats: Sequence[Format]
) -> Tensor:
    """float64 [formats, ceil(K / 32)], as `mixbits.formats.reference.fisher_statistics`."""
    out = _slab_sums(weight, formats)
    rows, columns = (_aligned(x.double().contiguous()) for x in (row_weight, column_weight))
    pointers = (weight.data_ptr(), rows.data_ptr(), columns.data_ptr(), out.data_ptr())
    dtype, codes = DTYPE_NUMBERS[weight.dtype], [fmt.code for fmt in formats]
    _native.fisher_statistics(*pointers, *weight.shape, dtype, codes)
    return out


def gradient_statistics(weight: Tensor, gradient: Tensor, formats: Sequence[Format]) -> Tensor:
    """float64 [formats, ceil(K / 32)], as `mixbits.formats.reference.gradient_statistics`."""
    out = _slab_sums(weight, formats)
    pointers = (weight.data_ptr(), gradient.data_ptr(), out.data_ptr())
    dtypes = (DTYPE_NUMBERS[weight.dtype], DTYPE_NUMBERS[gradient.dtype])
    codes = [fmt.code for fmt in formats]
    _native.gradient_statistics(*pointers, *weight.shape, *dtypes, codes)
    return out


def square_sums(x: Tensor, formats: Sequence[Format]) -> Tensor:
    """float64 [1 + formats, K], as `mixbits.formats.reference.square_sums`."""
    out = torch.empty((1 + len(formats), x.shape[1]), dtype=torch.float64)
    dtype, codes = DTYPE_NUMBERS[x.dtype], [fmt.code for fmt in formats]
    _native.square_sums(x.data_ptr(), out.data_ptr(), *x.shape, dtype, codes)
    return out


def compensate_group(
    group: Tensor,
    factor: Tensor,
    importance: Tensor,
    fmt: Format,
    divisor: Tensor | None = None,
    known: Scales | None = None,
) -> Group:
    """As `mixbits.formats.compensate.compensate_group`, to the bit."""
    rows, columns = group.shape
    if known is None and fmt.group_size == ROW:
        known = compensate.search_scales(group, fmt, importance)
    unusual = fmt.tensor_scale == "row" or (known is not None and fmt.group_size != ROW)
    if columns > MAX_COLUMNS or unusual:
        return compensate.compensate_group(group, factor, importance, fmt, divisor, known)
    if divisor is None:
        divisor = compensate.search_tensor_scale(group, fmt)
    group, factor, importance = map(_aligned, (group, factor, importance))
    codes = torch.empty((rows, columns), dtype=torch.uint8)
    given = None if known is None else known.scale.contiguous()
    scale = torch.empty((rows, 1), dtype=SCALE_DTYPES[fmt.scale]) if given is None else given
    zero_point = None if fmt.symmetric else torch.empty((rows, 1), dtype=torch.uint8)
    errors = torch.empty((rows, columns), dtype=torch.float32)
    inputs = (group.data_ptr(), factor.data_ptr(), importance.data_ptr())
    outputs = (*_pointers(Packed(codes, scale, zero_point)), errors.data_ptr())
    sizes = (rows, group.stride(0), factor.stride(0), columns, fmt.code)
    by = 1.0 if divisor is None else divisor.item()
    _native.compensate_group(
        *inputs, *outputs, *sizes, by, 0 if given is None else given.data_ptr()
    )
    return Group(codes, scale, zero_point, errors)


def linear_numbers(operand: Operand) -> list[int]:
    """A packed linear as csrc/bindings.cpp reads it."""
    parts, widths, order, rotated = operand
    place, entry = (0, 0) if order is None else (order.data_ptr(), order.element_size())
    numbers = [place, entry, int(rotated), operand.out_features, len(parts)]
    for (packed, fmt, activation), width in zip(parts, widths, strict=True):
        numbers += (
            *_pointers(packed),
            width,
            fmt.code,
            0 if activation is None else activation.code,
            _divisor(packed),
        )
    return numbers


def plain_numbers(weight: Tensor) -> list[int]:
    """The same for a weight [N, K] that was left alone, of the model's dtype: its format is 0."""
    rows, columns = weight.shape
    return [0, 0, 0, rows, 1, weight.data_ptr(), 0, 0, columns, 0, 0, 0]


def packed_matmuls(x: Tensor, operands: Sequence[Operand], int8_activations: bool) -> list[Tensor]:
    """x [M, K] times each packed weight [N_i, K] -> [M, N_i], in one call.

    All that see the same columns of x in one way share the tokens that are prepared for them.
    `int8_activations` lets tokens that have no format become 8-bit integers, 32 of them with one
    scale.
    """
    tokens, columns = x.shape
    outs: list[Tensor] = []
    targets: list[int] = []
    for operand in operands:
        out = x.new_empty((tokens, operand.out_features))
        outs.append(out)
        targets.append(out.data_ptr())
        targets += linear_numbers(operand)
    _native.packed_matmul(
        x.data_ptr(), tokens, columns, DTYPE_NUMBERS[x.dtype], int8_activations, targets
    )
    return outs


def step_model(
    layer_norms: Sequence[Sequence[int]],
    layer_linears: Sequence[Sequence[Sequence[int]]],
    norm: int,
    head: Sequence[int],
    sizes: Sequence[int],
    eps: float,
    dtype: torch.dtype,
) -> Any:
    """A model for `token_step`, which keeps the addresses of its tensors.

    Of a layer, norms are the addresses of RMSNorm's weights: of the input, after attention, of
    queries and of keys (0 without). Linears are query, key, value, output, gate, up and down, each
    in numbers: the address of its bias (0 without), whether activations may become 8-bit integers,
    and `linear_numbers`, or `plain_numbers` of one that was left alone. `sizes` are those of the
    hidden and of the intermediate state, key heads, query heads per key head, and a head's width.
    """
    scaling = sizes[-1] ** -0.5
    return _native.StepModel(
        layer_norms, layer_linears, norm, head, sizes, eps, scaling, DTYPE_NUMBERS[dtype]
    )


def token_step(
    model: Any,
    x: int,
    cos: int,
    sin: int,
    logits: Tensor,
    length: int,
    caches: Sequence[int],
) -> float:
    """One token through all layers of a `step_model`, into `logits` [vocab].

    x is the address of its embedding [hidden]; those of cos and sin [head width] turn queries and
    keys to its position. Of every layer, `caches` has the addresses of keys and values [1, key
    heads, capacity, head width] and the capacity; `length` tokens are there, and one is added.
    Returns the seconds that one thread spent in matmuls.
    """
    return float(model.step(x, cos, sin, logits.data_ptr(), length, caches))
