"""What a backend must refuse: formats that it has no code for, and what no backend can be given."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from conftest import FORMATS, MORE_FORMATS
from matrix import Matrix

from mixbits import ops
from mixbits.backends import choice
from mixbits.formats import reference
from mixbits.formats.pack import pack
from mixbits.formats.schemes import Format

USUAL = Format("e2m1", 32)
OF_WEIGHTS = ("quantize_pack", "dequantize", "every code and scale", "packed_matmul")
SENTENCES = (
    "backend '.*' cannot take Format|a weight has one scale of the whole tensor: got Format|"
    r"weight_global_scale of in_features=96, e2m1 must have shape \(1,\): got \(6, 1\)|"
    "rows of x share no scale of the tensor: got Format"
)


def calls(fmt: Format, backend: str | None, device: str = "cpu") -> dict[str, Callable[[], object]]:
    """Every operation that takes a backend, with a format -> what it gives."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 96, generator=generator)
    x = (x * torch.rand(6, 1, generator=generator).mul(8).exp2()).to(device)
    packed = pack(reference.quantize(x, fmt), fmt)
    weight = pack(reference.quantize(x, USUAL), USUAL)
    ones = torch.ones(6, device=device), torch.ones(96, device=device)
    two = [USUAL, fmt]

    def dequantize() -> object:
        return ops.dequantize(packed, fmt, 96, torch.float32, backend)

    return {
        "fake_quantize": lambda: ops.fake_quantize(x, fmt, backend),
        "quantize_pack": lambda: ops.quantize_pack(x, fmt, backend),
        "dequantize": dequantize,
        "every code and scale": dequantize,
        "fisher_statistics": lambda: ops.fisher_statistics(x, *ones, two, backend),
        "gradient_statistics": lambda: ops.gradient_statistics(x, x, two[::-1], backend),
        "square_sums": lambda: ops.square_sums(x, [USUAL, fmt, USUAL], backend),
        "packed_matmul": lambda: ops.packed_matmul(x, packed, fmt, None, backend),
        "activations": lambda: ops.packed_matmul(x, weight, USUAL, fmt, backend),
    }


def refuses(module: ModuleType, operation: str, fmt: Format) -> bool:
    """Whether a backend must refuse `fmt` in an operation, as it says what it has code for."""
    if operation in OF_WEIGHTS and fmt.tensor_scale == "row":
        return True
    if operation == "activations" and fmt.tensor_scale == "tensor":
        return True
    reads = operation in OF_WEIGHTS and operation != "quantize_pack"
    has_code = getattr(module, "decodes", module.holds) if reads else module.holds
    return not has_code(fmt)


def check_refusals(matrix: Matrix, backend: str, way: str, device: str = "cpu") -> None:
    """All that it must refuse it does, in a sentence."""
    module = choice.module_of(backend)
    for fmt in FORMATS + MORE_FORMATS:
        for operation, call in calls(fmt, backend, device).items():
            if refuses(module, operation, fmt):
                with (
                    matrix.cell(backend, way, operation, fmt, "refused"),
                    pytest.raises(ValueError, match=SENTENCES),
                ):
                    call()


def check_twins(matrix: Matrix, backend: str, way: str) -> None:
    """A backend without code of its own for error compensation leaves it to the slow twin."""
    assert not hasattr(choice.module_of(backend), "compensate_group")
    for fmt in FORMATS + MORE_FORMATS:
        with matrix.cell(backend, way, "compensate_group", fmt, "twin"):
            pass
