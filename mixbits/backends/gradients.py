"""What a product with packed weights, or a rounding, passes back to its float input.

    y = Q(x') W'^T    gives    dL/dx' = dL/dy W'

which is exact where x is left as it is, and goes straight through Q where it is rounded (Bengio et
al., arXiv 1308.3432). x' and W' are x and W arranged; the arrangement is undone on the way. Packed
weights get no gradient. Nothing of x is kept for the way back.

Only what has asked for a gradient comes here: `is_wanted` is all that others pay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..formats.arrange import Arrangement
from ..formats.checks import check_packed, check_shape, check_values, in_memory, packed_in_memory
from ..formats.pack import Operand, Packed
from ..formats.schemes import Format
from .scratch import SCRATCH_BYTES

# x [M, K], packed weights [N_i, K] -> [M, N_i]
Multiply: TypeAlias = Callable[[Tensor, "Sequence[Operand]"], "list[Tensor]"]


def is_wanted(x: Tensor) -> bool:
    """Whether a result of x must say how it depends on x."""
    if x.requires_grad and torch.is_grad_enabled():
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


class _StraightThrough(torch.autograd.Function):
    """Rounded values, with the gradient of those that were rounded."""

    @staticmethod
    def forward(x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.view_as(tangent)


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, whose gradient is that of x; both of one shape and dtype."""
    out: Tensor = _StraightThrough.apply(x, rounded)
    return out


class _Products(torch.autograd.Function):
    """x times packed weights, whose tensors are arguments, so that torch knows what is kept."""

    @staticmethod
    def forward(
        x: Tensor, multiply: Multiply, backend: str | None, spec: Any, *leaves: Any
    ) -> tuple[Tensor, ...]:
        return tuple(multiply(x, tree_unflatten(leaves, spec)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.multiply, ctx.backend, ctx.spec, *leaves = inputs
        ctx.dtype = x.dtype
        ctx.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[i] for i in ctx.places]
        ctx.save_for_backward(*tensors)  # torch refuses if they are changed before it is used
        ctx.save_for_forward(*tensors)
        ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        pairs = zip(gradients, _operands(ctx), strict=True)
        parts = [_back(g, one, ctx.backend) for g, one in pairs if g is not None]
        total = functools.reduce(torch.add, parts).to(ctx.dtype) if parts else None
        return total, *([None] * (3 + len(ctx.others)))

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, ...]:
        unrounded = [_unrounded(one) for one in _operands(ctx)]
        return tuple(products(tangent, unrounded, ctx.multiply, ctx.backend))


def products(
    x: Tensor, operands: Sequence[Operand], multiply: Multiply, backend: str | None
) -> list[Tensor]:
    """`multiply(x, operands)`, with gradients of x, for which `backend` decodes the weights."""
    leaves, spec = tree_flatten(list(operands))
    return list(_Products.apply(x, multiply, backend, spec, *leaves))


def _operands(ctx: Any) -> list[Operand]:
    leaves = list(ctx.others)
    for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
        leaves[place] = tensor
    operands: list[Operand] = tree_unflatten(leaves, ctx.spec)
    return operands


def _unrounded(operand: Operand) -> Operand:
    return operand._replace(parts=tuple(part._replace(activation=None) for part in operand.parts))


def _back(gradient: Tensor, operand: Operand, backend: str | None) -> Tensor:
    """dL/dx [M, K] of x that `operand` [N, K] has multiplied; `gradient` is dL/dy [M, N]."""
    pieces = [_back_piece(gradient, *piece, backend) for piece in operand.pieces]
    if operand.is_plain:
        return pieces[0]
    order = None if operand.order is None else operand.order.long()
    # The matrix of an arrangement is orthogonal up to a factor that the weight has been divided by,
    # so that its transpose is what restores a weight.
    return Arrangement(order, operand.rotated).restore(torch.cat(pieces, 1))


def _back_piece(
    gradient: Tensor, packed: Packed, fmt: Format, columns: int, backend: str | None
) -> Tensor:
    arguments = (gradient, *packed, fmt.code, columns, backend)
    out: Tensor = torch.ops.mixbits.packed_matmul_backward(*arguments)
    return out


# --- torch.ops.mixbits: what torch.compile sees ------------------------------------------------


def _dtype(gradient: Tensor) -> torch.dtype:
    """Of dL/dx: float32 on a CPU; a GPU multiplies in 16 bits, with values of the weight alike."""
    return torch.float32 if gradient.device.type == "cpu" else gradient.dtype


def register(library: torch.library.Library, dequantize: Callable[..., Tensor]) -> None:
    """Give `fake_quantize` and `packed_matmul` of a library their gradients, and define

        packed_matmul_backward   gradient [M, N], packed [N, K] -> [M, K], float32 on a CPU

    `dequantize` is that of `mixbits.ops`.
    """

    def packed_matmul_backward(*arguments: Any) -> Tensor:
        gradient, packed, fmt, in_features, backend = _checked(*arguments)
        gradient, packed = in_memory("gradient", gradient), packed_in_memory(packed)
        dtype, rows = _dtype(gradient), gradient.shape[1]
        block = max(1, SCRATCH_BYTES // max(1, in_features * dtype.itemsize))
        out = gradient.new_zeros((gradient.shape[0], in_features), dtype=dtype)
        with torch.autocast(gradient.device.type, enabled=False):
            for first in range(0, rows, block):  # never the whole weight
                some = slice(first, first + block)
                values = dequantize(packed.rows(some), fmt, in_features, dtype, backend)
                out += gradient[:, some].to(dtype) @ values
        return out

    library.define(
        "packed_matmul_backward(Tensor gradient, Tensor weight_packed, Tensor weight_scale, "
        "Tensor? weight_zero_point, Tensor? weight_global_scale, int format, SymInt in_features, "
        "str? backend=None) -> Tensor"
    )
    name = "packed_matmul_backward"
    library.impl(name, packed_matmul_backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mixbits::{name}", _backward_meta, lib=library)
    for name, keep, backward in (
        ("fake_quantize", None, _pass_through),
        ("packed_matmul", _keep_weight, _transposed),
        ("packed_matmul_backward", _keep_weight, _transposed_back),
    ):
        torch.library.register_autograd(
            f"mixbits::{name}", backward, setup_context=keep, lib=library
        )


def _checked(
    gradient: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_global_scale: Tensor | None,
    code: int,
    in_features: int,
    backend: str | None = None,
) -> tuple[Tensor, Packed, Format, int, str | None]:
    """The arguments of the operator `packed_matmul_backward`, checked."""
    packed = Packed(weight_packed, weight_scale, weight_zero_point, weight_global_scale)
    fmt = Format.from_code(code)
    check_values("gradient", gradient, 2)
    check_packed(packed, fmt, in_features, gradient.device)
    check_shape("gradient", gradient, (gradient.shape[0], packed.weight_packed.shape[0]))
    return gradient, packed, fmt, in_features, backend


def _backward_meta(*arguments: Any) -> Tensor:
    gradient, _, _, in_features, _ = _checked(*arguments)
    return gradient.new_empty((gradient.shape[0], in_features), dtype=_dtype(gradient))


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Of `packed_matmul`, and of `packed_matmul_backward`, which is its transpose."""
    x, *packed, ctx.code, _, ctx.backend = inputs[:8]
    ctx.columns, ctx.dtype = x.shape[1], x.dtype
    ctx.save_for_backward(*packed)


def _pass_through(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return gradient, None, None


def _transposed(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    arguments = (*ctx.saved_tensors, ctx.code, ctx.columns, ctx.backend)
    out = torch.ops.mixbits.packed_matmul_backward(gradient, *arguments)
    return out.to(ctx.dtype), *[None] * 8


def _transposed_back(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    arguments = (*ctx.saved_tensors, ctx.code, 0, ctx.backend)
    out = torch.ops.mixbits.packed_matmul(gradient, *arguments)
    return out.to(ctx.dtype), *[None] * 7
