"""torch.ops.mixbits: what torch.compile sees in place of the functions of `mixbits.ops`.

    fake_quantize            x [..., K] -> [..., K]
    packed_matmul            x [M, K], packed [N, K] -> [M, N]
    packed_matmul_backward   gradient [M, N], packed [N, K] -> [M, K]    (`.gradients`)

Formats are given as their codes (`Format.code`; 0 for an activation that stays as it is), and a
packed weight as its tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..formats.checks import check_packed, check_values
from ..formats.pack import Operand, Packed
from ..formats.schemes import Format
from . import gradients

_library = torch.library.Library("mixbits", "DEF")  # operators live as long as this
_library.define("fake_quantize(Tensor x, int format, str? backend=None) -> Tensor")
_library.define(
    "packed_matmul(Tensor x, Tensor weight_packed, Tensor weight_scale, "
    "Tensor? weight_zero_point, Tensor? weight_global_scale, int format, int activation, "
    "str? backend=None, bool int8_activations=False) -> Tensor"
)


def register(
    quantize: Callable[..., Tensor],
    multiply: Callable[..., Tensor],
    dequantize: Callable[..., Tensor],
) -> None:
    """Let the operators run `fake_quantize`, `packed_matmul` and `dequantize` of `mixbits.ops`."""

    def fake_quantize(x: Tensor, code: int, backend: str | None = None) -> Tensor:
        return quantize(x, _format(code), backend)

    def packed_matmul(*arguments: Any) -> Tensor:
        return multiply(*_decoded(*arguments))

    _library.impl("fake_quantize", fake_quantize, "CompositeExplicitAutograd")
    _library.impl("packed_matmul", packed_matmul, "CompositeExplicitAutograd")
    torch.library.register_fake("mixbits::fake_quantize", _fake_quantize_meta, lib=_library)
    torch.library.register_fake("mixbits::packed_matmul", _packed_matmul_meta, lib=_library)
    gradients.register(_library, dequantize)


def fake_quantize(x: Tensor, fmt: Format, backend: str | None) -> Tensor:
    """`mixbits.ops.fake_quantize` as an operator."""
    out: Tensor = torch.ops.mixbits.fake_quantize(x, fmt.code, backend)
    return out


def packed_matmul(
    x: Tensor, operand: Operand, backend: str | None, int8_activations: bool
) -> Tensor:
    """`mixbits.ops.packed_matmul` of a plain operand, as an operator."""
    packed, fmt, activation = operand.parts[0]
    code = 0 if activation is None else activation.code
    out: Tensor = torch.ops.mixbits.packed_matmul(
        x, *packed, fmt.code, code, backend, int8_activations
    )
    return out


@functools.cache
def _format(code: int) -> Format:
    return Format.from_code(code)


def _decoded(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_global_scale: Tensor | None,
    code: int,
    activation: int,
    backend: str | None = None,
    int8_activations: bool = False,
) -> tuple[Tensor, Packed, Format, Format | None, str | None, bool]:
    """Arguments of the operator `packed_matmul` -> those of the function."""
    packed = Packed(weight_packed, weight_scale, weight_zero_point, weight_global_scale)
    act = _format(activation) if activation else None
    return x, packed, _format(code), act, backend, int8_activations


def _fake_quantize_meta(x: Tensor, code: int, backend: str | None = None) -> Tensor:
    check_values("x", x)
    _format(code)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _packed_matmul_meta(*arguments: Any) -> Tensor:
    x, packed, fmt, *_ = _decoded(*arguments)
    check_values("x", x, 2)
    check_packed(packed, fmt, x.shape[1], x.device)
    return x.new_empty((x.shape[0], packed.weight_packed.shape[0]))
