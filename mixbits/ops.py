"""The operations: argument checks, and choice of backend.

    operation             arguments                            result
    fake_quantize         x [..., K]                           [..., K], x's dtype
    quantize_pack         weight [N, K]                        Packed (mixbits.formats.pack)
    dequantize            Packed, K, dtype                     [N, K]
    fisher_statistics     weight [N, K], row [N], column [K]   float64 [formats, ceil(K / 32)]
    gradient_statistics   weight [N, K], gradient [N, K]       float64 [formats, ceil(K / 32)]
    square_sums           x [T, K]                             float64 [1 + formats, K]
    compensate_group      group [N, columns], factor, ...      compensate.Group
    packed_matmul         x [M, K], Packed [N, K]              [M, N], x's dtype
    packed_matmuls        x [M, K], Operands [N_i, K]          list of [M, N_i]
    fold_rows             Packed, K                            uint8 [N], or None
    packed_matmul_fp8     x [M, K], Packed [N, K], uint8 [N]   [M, N], x's dtype

What each means is said in `mixbits.formats.reference`, `compensate` and `fp8_weights`. Values may
be bfloat16, float16 or float32, need not be contiguous, and lie on one device. Gradients flow to x
through products and `fake_quantize` (`mixbits.backends.gradients`), and through nothing else.

The backend is the argument `backend`, else the environment variable MIXBITS_BACKEND, else the
best there is for the tensor's device. In eager mode its functions are called directly;
`fake_quantize` and `packed_matmul` are also registered as torch.ops.mixbits.*, and that is what
torch.compile sees (`mixbits.backends.registered`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .backends import gradients, registered
from .backends.choice import BACKENDS as BACKENDS
from .backends.choice import (
    backend_for,
    by_holder,
    choose_backend,
    holder,
    module_of,
    requested_backend,
)
from .backends.choice import backends as backends
from .errors import UsageError
from .formats import compensate, fp8_weights, reference
from .formats.arrange import Arrangement
from .formats.checks import (
    DTYPES,
    check_device,
    check_format,
    check_formats,
    check_packed,
    check_shape,
    check_tensor,
    check_values,
    checked_operand,
    device_of,
    in_memory,
    is_in_memory,
    is_wrapped,
    packed_in_memory,
    rows_in_memory,
)
from .formats.compensate import Group
from .formats.pack import Operand, Packed, Part, empty_packed
from .formats.schemes import Format


def explain_matmul(
    device_type: str,
    fmt: Format,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> str:
    """How x [m, k] of `dtype` on `device_type` would meet a packed [n, k]: "backend: way".

    The choice depends on these arguments, MIXBITS_BACKEND and what is installed; nothing runs.
    """
    name = holder(device_type, requested_backend(backend), (), (fmt,))
    explain = getattr(module_of(name), "explain_matmul", None)
    return name if explain is None else f"{name}: {explain(fmt, m, n, k, dtype)}"


def _ready(name: str, x: Tensor, module: Any) -> Tensor:
    """x as a backend wants it: `in_memory`, and without what only autograd looks at."""
    if not is_wrapped(x):
        return in_memory(name, x).detach()
    if module is not module_of("reference"):
        raise TypeError(
            f"{name} must be a tensor with memory of its own: got one that stands for others, as "
            f"in torch.vmap, which backend='reference' can take"
        )
    return x.detach().contiguous()


# --- operations ------------------------------------------------------------------------------


def fake_quantize(x: Tensor, fmt: Format, backend: str | None = None) -> Tensor:
    """Round trip of x [..., K] through codes of `fmt`, groups along K, in x's own dtype.

    Gradients go straight through. Raises TypeError or ValueError for a tensor that it cannot take,
    UsageError for a backend.
    """
    if torch.compiler.is_compiling():
        check_format("format", fmt)
        return registered.fake_quantize(x, fmt, backend)
    check_values("x", x)
    check_format("format", fmt)
    if x.dim() == 0:
        raise ValueError("x must have a dimension to group along: got a scalar")
    module = backend_for(x, backend, (fmt,))
    if x.numel() == 0:
        return torch.empty_like(x)
    rounded: Tensor = module.fake_quantize(_ready("x", x, module), fmt)
    return gradients.straight_through(x, rounded) if gradients.is_wanted(x) else rounded


def quantize_pack(weight: Tensor, fmt: Format, backend: str | None = None) -> Packed:
    """Quantize and pack a weight [N, K]; `mixbits.formats.pack` gives the result's shapes.

    Groups that hold a NaN or an infinity get a NaN scale: refuse them before.
    """
    check_values("weight", weight, 2)
    check_format("format", fmt)
    if fmt.tensor_scale == "row":
        raise UsageError(f"a weight has one scale of the whole tensor: got {fmt}")
    module = backend_for(weight, backend, (fmt,))
    if weight.numel() == 0:
        return empty_packed(fmt, weight.shape[0], weight.shape[1], weight.device)
    return module.quantize_pack(_ready("weight", weight, module), fmt)


def dequantize(
    packed: Packed,
    fmt: Format,
    in_features: int,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """The [N, K] values of a packed weight in `dtype`; `in_features` is K."""
    device = device_of(packed)
    check_packed(packed, fmt, in_features, device)
    out_shape = (packed.weight_packed.shape[0], in_features)
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be bfloat16, float16 or float32: got {dtype}")
    module = backend_for(packed.weight_packed, backend, (), (fmt,))
    if 0 in out_shape:
        return torch.empty(out_shape, dtype=dtype, device=device)
    return module.dequantize(packed_in_memory(packed), fmt, in_features, dtype)


def _no_statistics(weight: Tensor, formats: Sequence[Format]) -> Tensor:
    shape = (len(formats), -(-weight.shape[1] // 32))
    return torch.zeros(shape, dtype=torch.float64, device=weight.device)


def fisher_statistics(
    weight: Tensor,
    row_weight: Tensor,
    column_weight: Tensor,
    formats: Sequence[Format],
    backend: str | None = None,
) -> Tensor:
    """float64 [formats, slabs]: sum of row_weight_n column_weight_k (W - Q(W))_nk^2 per slab.

    weight [N, K], row_weight [N] and column_weight [K] of any float dtype; a slab is 32 columns;
    Q is fake-quantization in float32. The result does not depend on the number of threads.
    """
    check_values("weight", weight, 2)
    for name, vector, length in (
        ("row_weight", row_weight, weight.shape[0]),
        ("column_weight", column_weight, weight.shape[1]),
    ):
        check_tensor(name, vector)
        check_shape(name, vector, (length,))
        check_device(name, vector, weight.device)
        if not vector.is_floating_point():
            raise TypeError(f"{name} must be of a float dtype: got {vector.dtype}")
    formats = check_formats(formats)
    if weight.numel() == 0 or not formats:
        backend_for(weight, backend, formats)
        return _no_statistics(weight, formats)
    named = (("weight", weight), ("row_weight", row_weight), ("column_weight", column_weight))

    def call(module: Any, some: list[Format]) -> Tensor:
        return module.fisher_statistics(*(_ready(*pair, module) for pair in named), some)

    return by_holder(weight, formats, backend, call)


def gradient_statistics(
    weight: Tensor, gradient: Tensor, formats: Sequence[Format], backend: str | None = None
) -> Tensor:
    """float64 [formats, slabs]: sum of |g_nk (W - Q(W))_nk| per slab of 32 columns.

    weight and gradient are [N, K], each of its own dtype; Q is fake-quantization in float32. The
    result does not depend on the number of threads.
    """
    check_values("weight", weight, 2)
    check_values("gradient", gradient, 2)
    check_shape("gradient", gradient, tuple(weight.shape))
    check_device("gradient", gradient, weight.device)
    formats = check_formats(formats)
    if weight.numel() == 0 or not formats:
        backend_for(weight, backend, formats)
        return _no_statistics(weight, formats)
    named = (("weight", weight), ("gradient", gradient))

    def call(module: Any, some: list[Format]) -> Tensor:
        return module.gradient_statistics(*(_ready(*pair, module) for pair in named), some)

    return by_holder(weight, formats, backend, call)


def require_fp8(device: torch.device | str, backend: str | None = None) -> None:
    """Raise UsageError that says why products on `device` cannot have activations in e4m3."""
    device = torch.device(device)
    name = choose_backend(device.type, requested_backend(backend))
    why: str | None = f"the cuda backend is needed: got {name} on {device.type}"
    if name == "cuda":
        why = module_of("cuda_fp8").why_unavailable(device)
    if why is not None:
        raise UsageError(f"activations in 8-bit floats: {why}")


def fold_rows(packed: Packed, fmt: Format, in_features: int) -> Tensor | None:
    """Scales of rows that make a weight in e2m1 one of e4m3, or None where a row does not fit.

    See `mixbits.formats.fp8_weights.fold_rows`. Raises UsageError for other formats.
    """
    check_packed(packed, fmt, in_features, device_of(packed))
    if not fp8_weights.can_fold(fmt):
        raise UsageError(f"activations in 8-bit floats need weights in MXFP4: got {fmt.element}")
    if in_features == 0:
        raise UsageError("activations in 8-bit floats need weights with columns: got none")
    return fp8_weights.fold_rows(packed_in_memory(packed))


def packed_matmul_fp8(
    x: Tensor, packed: Packed, fmt: Format, row_scale: Tensor, backend: str | None = None
) -> Tensor:
    """`packed_matmul` of a weight in e2m1, where x may be rounded to e4m3, for speed.

    `row_scale` uint8 [N] is what `fold_rows` gave for this very weight. Where nothing is gained
    (few tokens), x is left as it is; else the result is that of
    `mixbits.formats.fp8_weights.matmul`, but for the order of sums, and for the 14 binary digits
    that sums over 128 columns have. Raises UsageError where `require_fp8` does.
    """
    check_values("x", x, 2)
    require_fp8(x.device, backend)
    operand = checked_operand(Operand.plain(packed, fmt, x.shape[1]), x.shape[1], x.device)
    packed = operand.parts[0].packed
    check_tensor("row_scale", row_scale)
    check_shape("row_scale", row_scale, (packed.weight_packed.shape[0],))
    check_device("row_scale", row_scale, x.device)
    if not fp8_weights.can_fold(fmt) or row_scale.dtype != torch.uint8:
        got = f"{row_scale.dtype} for {fmt.element}"
        raise TypeError(f"row_scale must be torch.uint8, for weights in e2m1: got {got}")
    if gradients.is_wanted(x):

        def multiply(x: Tensor, operands: Sequence[Operand]) -> list[Tensor]:
            return [packed_matmul_fp8(x.detach(), packed, fmt, row_scale, backend)]

        return gradients.products(x, [operand], multiply, backend)[0]
    if x.numel() == 0:
        return x.new_zeros((x.shape[0], row_scale.shape[0]))
    x, row_scale = in_memory("x", x), in_memory("row_scale", row_scale)
    out: Tensor = module_of("cuda_fp8").packed_matmul(x, packed, fmt, row_scale)
    return out


def square_sums(x: Tensor, formats: Sequence[Format], backend: str | None = None) -> Tensor:
    """float64 [1 + formats, K]: sums over the rows of x [T, K] of x_k^2 and (x - Q(x))_k^2.

    Squares are float32; Q is fake-quantization in float32.
    """
    check_values("x", x, 2)
    formats = check_formats(formats)
    if x.numel() == 0:
        backend_for(x, backend, formats)
        shape = (1 + len(formats), x.shape[1])
        return torch.zeros(shape, dtype=torch.float64, device=x.device)

    def call(module: Any, some: list[Format]) -> Tensor:
        values = _ready("x", x, module)
        if x.is_cuda and backend is None and not hasattr(module, "square_sums"):
            triton = module_of("triton")
            if triton.why_unavailable() is None and all(map(triton.holds, some)):
                module = triton
        fused = getattr(module, "square_sums", None)
        if fused is None:
            return reference.square_sums(values, some, module.fake_quantize)
        return fused(values, some)

    return by_holder(x, formats, backend, call, shared=1)


def compensate_group(
    group: Tensor,
    factor: Tensor,
    importance: Tensor,
    fmt: Format,
    divisor: Tensor | None = None,
    known: reference.Scales | None = None,
) -> Group:
    """`mixbits.formats.compensate.compensate_group`, by native code where there is some.

    group float32 [N, columns], of which there are at most as many as the format has in a group;
    factor float32 [columns, columns], importance float32 [columns].
    """
    check_values("group", group, 2)
    check_format("format", fmt)
    columns = group.shape[1]
    if not 0 < columns <= (fmt.group_size or columns):
        raise ValueError(f"a group of {fmt} has 1 to {fmt.group_size} columns: got {columns}")
    named = {"group": group, "factor": factor, "importance": importance}
    shapes = (tuple(group.shape), (columns, columns), (columns,))
    for (name, x), shape in zip(named.items(), shapes, strict=True):
        check_tensor(name, x)
        check_shape(name, x, shape)
        check_device(name, x, group.device)
        if x.dtype != torch.float32:
            raise TypeError(f"{name} must be float32: got {x.dtype}")
    module = backend_for(group, None, (fmt,))
    native = getattr(module, "compensate_group", None)
    if native is None or group.numel() == 0:
        return compensate.compensate_group(group, factor, importance, fmt, divisor, known)
    rest = (_ready(name, named[name], module) for name in ("factor", "importance"))
    found: Group = native(rows_in_memory("group", group), *rest, fmt, divisor, known)
    return found


def packed_matmul(
    x: Tensor,
    packed: Packed,
    fmt: Format,
    activation: Format | None = None,
    backend: str | None = None,
    int8_activations: bool = False,
) -> Tensor:
    """x [M, K] times the packed weight [N, K] transposed -> [M, N] in x's dtype.

    With `activation`, x is fake-quantized to it first. Sums are in float32 or exact integers;
    backends differ in their order only. Where x is left as it is, the CPU may turn it into
    integers: of 24 bits in a block of 32 for float32, of 16 bits for bfloat16 and float16, whose
    results have fewer digits than that, and twice as many where a block has a few large values.
    `int8_activations` allows 8 bits, for speed; a backend that has nothing to gain ignores it.
    """
    check_values("x", x, 2)
    operand = Operand.plain(packed, fmt, x.shape[1], activation)
    return packed_matmuls(x, [operand], backend, int8_activations)[0]


def packed_matmuls(
    x: Tensor,
    operands: Sequence[Operand],
    backend: str | None = None,
    int8_activations: bool = False,
) -> list[Tensor]:
    """x [M, K] times several packed weights [N_i, K], as `packed_matmul` does one -> [M, N_i].

    The products of an operand's parts are added in float32 and rounded once. What x must go through
    is done once for all operands that agree on it.
    """
    check_values("x", x, 2)
    found = [checked_operand(one, x.shape[1], x.device) for one in operands]
    return packed_matmuls_unchecked(x, found, backend, int8_activations)


def packed_matmuls_unchecked(
    x: Tensor,
    operands: Sequence[Operand],
    backend: str | None = None,
    int8_activations: bool = False,
) -> list[Tensor]:
    """`packed_matmuls` for a caller that has checked the weights
    (`mixbits.formats.checks.checked_operand`).

    Nothing looks again, and memory beyond theirs would be read; but the CPU refuses an order that
    would reach beyond x. x [M, K] itself is checked here.
    """
    if x.dtype not in DTYPES:
        check_values("x", x, 2)
    if torch.compiler.is_compiling():
        return [_compiled_matmul(x, operand, backend, int8_activations) for operand in operands]
    if gradients.is_wanted(x):

        def multiply(x: Tensor, operands: Sequence[Operand]) -> list[Tensor]:
            return packed_matmuls_unchecked(x.detach(), operands, backend, int8_activations)

        return gradients.products(x, operands, multiply, backend)
    module = backend_for(x, backend, activations_of(operands), weights_of(operands))
    if x.numel() == 0:
        return [x.new_zeros((x.shape[0], operand.out_features)) for operand in operands]
    x = x if is_in_memory(x) else _ready("x", x, module)
    if hasattr(module, "packed_matmuls"):
        outs: list[Tensor] = module.packed_matmuls(x, operands, bool(int8_activations))
        return outs
    takes_parts = getattr(module, "TAKES_PARTS", False)
    return [
        module.packed_matmul(x, operand)
        if takes_parts and operand.is_regular
        else _one_by_one(x, operand, module.packed_matmul, backend)
        for operand in operands
    ]


def weights_of(operands: Iterable[Operand]) -> list[Format]:
    """Formats of weights, as often as they occur."""
    return [one.format for operand in operands for one in operand.parts]


def activations_of(operands: Iterable[Operand]) -> list[Format]:
    """Formats that x is rounded to, as often as they occur."""
    parts = (one for operand in operands for one in operand.parts)
    return [one.activation for one in parts if one.activation is not None]


# x [M, K], a plain operand [N, K] -> [M, N]
_Multiply: TypeAlias = Callable[[Tensor, Operand], Tensor]


def _one_by_one(x: Tensor, operand: Operand, multiply: _Multiply, backend: str | None) -> Tensor:
    """A product by a backend that knows plain operands only: the slow twin of a native one."""
    if operand.is_plain:
        if operand.parts[0].packed.weight_packed.numel() == 0:
            return x.new_zeros((x.shape[0], operand.out_features))
        return multiply(x, operand)
    # torch indexes by 32 bits at least.
    order = None if operand.order is None else operand.order.int()
    arranged = Arrangement(order, operand.rotated).input(x)
    parts = zip(operand.parts, arranged.split(operand.columns, -1), strict=True)
    products = [_product_of_part(part, one, multiply, backend) for one, part in parts]
    return functools.reduce(torch.add, products).to(x.dtype)


def _product_of_part(x: Tensor, one: Part, multiply: _Multiply, backend: str | None) -> Tensor:
    """In float32, for a sum that is rounded once; x is rounded in its own dtype, as elsewhere."""
    if one.activation is not None:
        x = fake_quantize(x, one.activation, backend)
    plain = Operand.plain(one.packed, one.format, x.shape[1])
    return _one_by_one(x.contiguous().float(), plain, multiply, backend)


def _compiled_matmul(
    x: Tensor, operand: Operand, backend: str | None, int8_activations: bool
) -> Tensor:
    def multiply(x: Tensor, operand: Operand) -> Tensor:
        return registered.packed_matmul(x, operand, backend, int8_activations)

    return _one_by_one(x, operand, multiply, backend)


registered.register(fake_quantize, packed_matmul, dequantize)
