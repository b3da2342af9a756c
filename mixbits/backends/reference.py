"""`mixbits.formats.reference` as a backend: plain torch, any device, slow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats import reference
from ..formats.pack import Operand, Packed, pack, unpack
from ..formats.schemes import Format

fake_quantize = reference.fake_quantize
square_sums = reference.square_sums


def why_unavailable() -> str | None:
    return None


def supports(device: torch.device) -> bool:
    return True


def holds(fmt: Format) -> bool:
    return True


def quantize_pack(weight: Tensor, fmt: Format) -> Packed:
    return pack(reference.quantize(weight, fmt), fmt)


def dequantize(packed: Packed, fmt: Format, in_features: int, dtype: torch.dtype) -> Tensor:
    return reference.dequantize(unpack(packed, fmt, in_features), fmt, dtype)


def fisher_statistics(
    weight: Tensor, row_weight: Tensor, column_weight: Tensor, formats: Sequence[Format]
) -> Tensor:
    return reference.fisher_statistics(weight, row_weight, column_weight, formats)


def gradient_statistics(weight: Tensor, gradient: Tensor, formats: Sequence[Format]) -> Tensor:
    return reference.gradient_statistics(weight, gradient, formats)


def packed_matmul(x: Tensor, operand: Operand) -> Tensor:
    packed, fmt, activation = operand.parts[0]
    return reference.matmul(x, unpack(packed, fmt, x.shape[1]), fmt, activation)
