"""What is asked of a GPU's backend, whichever it is: its results are the reference's."""

import functools
import itertools
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
from conftest import (
    DTYPES,
    FORMATS,
    MORE_FORMATS,
    all_codes_and_scales,
    assert_same_bits,
    format_id,
    hard_rows,
)
from matrix import Matrix
from mixes import ARRANGED, exact_product, make_mix

from mixbits.formats import pack, reference
from mixbits.formats.arrange import Arrangement
from mixbits.formats.schemes import MINIFLOATS, MX_GROUP, Format

ALL = FORMATS + MORE_FORMATS
WEIGHTS = [fmt for fmt in ALL if fmt.tensor_scale != "row"]
ROUND_TRIP = ("fake_quantize", "quantize_pack", "dequantize")
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=format_id)
# One format of each element and scale, with zero points and without, which weights may have.
KINDS = [fmt for fmt in WEIGHTS if fmt.group_size <= 32 and fmt.scale_mode == "floor"]


def cells(matrix: Matrix, backend: ModuleType, device: torch.device) -> Callable:
    """`matrix.cell` of a backend: on a GPU, or on tensors of the CPU, which a stand-in takes."""
    name = backend.__name__.rpartition(".")[2]
    stand_in = {"cuda": "emulated", "triton": "interpreted"}[name]
    return functools.partial(matrix.cell, name, "GPU" if device.type == "cuda" else stand_in)


def every_scale_and_code(fmt: Format) -> tuple[reference.Quantized, torch.Tensor]:
    """Row s has scale s and all codes of a float but NaNs, at least 64; and the codes of NaNs."""
    codes = torch.arange(1 << fmt.bits, dtype=torch.uint8)
    nan = reference.minifloat_decode(codes, MINIFLOATS[fmt.element]).isnan()
    bad = codes[nan]
    codes = torch.where(nan, 0, codes).repeat(64 // len(codes) + 1)[: max(64, len(codes))]
    scale = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, len(codes) // MX_GROUP)
    return reference.Quantized(codes.repeat(256, 1), scale), bad


def every_zero_point_and_code(fmt: Format) -> reference.Quantized:
    """Row z of 256 columns has zero point z and all codes of an integer; scales of all sizes."""
    levels = 1 << fmt.bits
    zero_point = torch.arange(levels, dtype=torch.uint8)[:, None].repeat(1, 2)
    codes = torch.arange(256).remainder(levels).to(torch.uint8).repeat(levels, 1)
    scale = torch.logspace(-5, 2, 2 * levels, dtype=torch.float64).to(torch.float16)
    return reference.Quantized(codes, scale.view(levels, 2), zero_point)


def check_round_trip(
    backend: ModuleType,
    device: torch.device,
    fmt: Format,
    columns: int,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> None:
    for dtype in dtypes:
        w = hard_rows(columns, dtype)
        got = backend.fake_quantize(w.to(device), fmt)
        assert_same_bits(got.cpu(), reference.fake_quantize(w, fmt))
        if fmt.tensor_scale == "row":
            continue  # no weight has it
        q = reference.quantize(w, fmt)
        expected = pack.pack(q, fmt)
        got = backend.quantize_pack(w.to(device), fmt)
        for ours, theirs in zip(got, expected, strict=True):
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                assert_same_bits(ours.cpu(), theirs)
        values = backend.dequantize(got, fmt, columns, dtype)
        assert_same_bits(values.cpu(), reference.dequantize(q, fmt, dtype))


def check_all_codes_and_scales(
    backend: ModuleType,
    device: torch.device,
    fmt: Format,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> None:
    q = all_codes_and_scales(fmt)
    packed = pack.pack(q, fmt).to(device)
    for dtype in dtypes:
        got = backend.dequantize(packed, fmt, q.codes.shape[1], dtype)
        assert_same_bits(got.cpu(), reference.dequantize(q, fmt, dtype))


def repeats(device: torch.device) -> bool:
    """Whether a second run could differ: what is interpreted goes step by step."""
    return device.type != "cpu"


def check_statistics(
    backend: ModuleType,
    device: torch.device,
    columns: int,
    formats: list[Format] = FORMATS,
    rows: int = 41,
) -> None:
    """Equal but for the order of a few thousand float64 additions; the same bits every time."""
    generator = torch.Generator().manual_seed(columns)
    gradient = torch.randn(rows, columns, generator=generator)
    row_weight = torch.rand(rows, generator=generator)
    column_weight = torch.rand(columns, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.randn(rows, columns, generator=generator).to(dtype)
        g = gradient.to(dtype)
        expected = reference.fisher_statistics(w, row_weight, column_weight, formats)
        inputs = [t.to(device) for t in (w, row_weight, column_weight)]
        got = backend.fisher_statistics(*inputs, formats)
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-12, atol=0)
        if repeats(device):
            assert torch.equal(got, backend.fisher_statistics(*inputs, formats))
        expected = reference.gradient_statistics(w, g, formats)
        got = backend.gradient_statistics(w.to(device), g.to(device), formats)
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-12, atol=0)


def square_sums_of(backend: ModuleType) -> Callable:
    """As `mixbits.ops` does: by the backend's own code, or by its fake_quantize."""
    fused = getattr(backend, "square_sums", None)
    return fused or (lambda x, some: reference.square_sums(x, some, backend.fake_quantize))


def check_square_sums(
    backend: ModuleType,
    device: torch.device,
    columns: int,
    formats: list[Format] = FORMATS,
    rows: int = 41,
) -> None:
    """Equal but for the order of float64 additions; the same bits every time."""
    generator = torch.Generator().manual_seed(columns)
    call = square_sums_of(backend)
    for dtype in DTYPES:
        x = torch.randn(rows, columns, generator=generator).to(dtype)
        for some in (formats, formats[:2], []) if dtype == torch.float32 else (formats,):
            got = call(x.to(device), some)
            torch.testing.assert_close(
                got.cpu(), reference.square_sums(x, some), rtol=1e-12, atol=0
            )
            if repeats(device):
                assert torch.equal(got, call(x.to(device), some))


def check_matmul(
    backend: ModuleType,
    device: torch.device,
    fmt: Format,
    shape: tuple[int, int, int],
    activation: Format | None = None,
) -> None:
    """Largest error against float64 at most twice that of torch's product in the same dtype."""
    m, n, k = shape
    generator = torch.Generator().manual_seed(m + n + k)
    q = reference.quantize(torch.randn(n, k, generator=generator), fmt)
    packed = pack.Packed(*(t if t is None else t.to(device) for t in pack.pack(q, fmt)))
    for dtype in DTYPES:
        x = torch.randn(m, k, generator=generator).to(dtype)
        rounded = x if activation is None else reference.fake_quantize(x, activation)
        exact = rounded.double() @ reference.dequantize(q, fmt).double().T
        plain = rounded.to(device) @ reference.dequantize(q, fmt, dtype).to(device).T
        got = backend.packed_matmul(x.to(device), pack.Operand.plain(packed, fmt, k, activation))
        assert (got.dtype, got.shape) == (dtype, (m, n))
        magnitude = rounded.double().abs() @ reference.dequantize(q, fmt).double().abs().T
        check_error(got, plain, exact, magnitude)


def check_error(
    got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor
) -> None:
    """Of `got`, at most twice that of torch's `plain`; `magnitude` has the sums of |products|."""
    allowed = 2 * (plain.cpu().double() - exact).abs().max().item()
    # Few and short sums may be exact by luck: one ulp of the largest result is always
    # allowed, and one float32 rounding of the largest sum of magnitudes.
    allowed = max(allowed, torch.finfo(got.dtype).eps * exact.abs().max().item())
    allowed += torch.finfo(torch.float32).eps * magnitude.max().item()
    error = (got.cpu().double() - exact).abs().max().item()
    assert error <= allowed, f"{got.dtype} {got.shape}: error {error:.3g}, allowed {allowed:.3g}"


# Schemes of segments with their columns; not all kernels take 172, whose last group is short.
MIXES = {
    "MX": (("MXFP8", 96), ("MXFP4", 32), ("MXFP8", 160)),
    "MX, inputs alone": (("MXFP4A16", 160), ("MXFP8A16", 64)),
    "integers": (("W8A16", 128), ("W4A16ASYM", 64), ("W2A16G32ASYM", 96)),
    "both": (("MXFP8E5M2", 32), ("W4A16", 160), ("MXFP4", 64)),
    "172": (("MXFP8", 32), ("MXFP4", 140)),
    "one": (("MXFP4", 172),),
}


def check_mixed(
    backend: ModuleType,
    device: torch.device,
    segments: str | tuple[tuple[str, int], ...],
    shape: tuple[int, int],
    arranged: str = "natural",
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> None:
    """`check_matmul` for a weight in segments, rows of x in order and rotated."""
    m, n = shape
    mix, values = make_mix(MIXES.get(segments, segments), arranged, n)
    order = None if mix.order is None else mix.order.to(device)
    parts = tuple(one._replace(packed=one.packed.to(device)) for one in mix.parts)
    there = mix._replace(parts=parts, order=order)
    for dtype in dtypes:
        x = torch.randn(m, values.shape[1]).to(dtype)
        exact, magnitude, rounded = exact_product(x, mix, values)
        inner = mix.input_dtype(dtype)
        plain = (rounded.to(inner).to(device) @ values.to(inner).to(device).T).to(dtype)
        got = backend.packed_matmul(x.to(device), there)
        assert (got.dtype, got.shape) == (dtype, (m, n))
        check_error(got, plain, exact, magnitude)


def arranged_reference(x: torch.Tensor, mix: pack.Operand) -> torch.Tensor:
    """x as `mix` multiplies it, by mixbits.formats.arrange and mixbits.formats.reference."""
    order = None if mix.order is None else mix.order.int()
    pieces = Arrangement(order, mix.rotated).input(x).split(mix.columns, -1)
    rounded = [
        piece if one.activation is None else reference.fake_quantize(piece, one.activation)
        for piece, one in zip(pieces, mix.parts, strict=True)
    ]
    return torch.cat(rounded, 1).to(mix.input_dtype(x.dtype))


def check_arrange(
    arrange: Callable[[torch.Tensor, pack.Operand, torch.dtype], torch.Tensor], device: torch.device
) -> None:
    """To the bit: NaN, infinity, ties and subnormals go through an order, a rotation, a rounding.

    Orders are of one, two and four bytes per column.
    """
    for columns in (172, 300):
        segments = (("MXFP8", 64), ("MXFP4A16", 32), ("MXFP4", columns - 96))
        for how in ARRANGED:
            mix, _ = make_mix(segments, how, 1)
            orders = [None] if mix.order is None else [mix.order, mix.order.int()]
            for order, dtype in itertools.product(orders, DTYPES):
                one = mix._replace(order=None if order is None else order.to(device))
                x = hard_rows(columns, dtype)
                got = arrange(x.to(device), one, mix.input_dtype(dtype))
                assert_same_bits(got.cpu(), arranged_reference(x, mix))


def check_empty(backend: ModuleType, device: torch.device, fmt: Format) -> None:
    for rows, tokens in ((3, 0), (0, 3)):
        packed = backend.quantize_pack(torch.ones(rows, 64, device=device), fmt)
        mix = pack.Operand((pack.Part(packed, fmt), pack.Part(packed, fmt)), (64, 64))
        x = torch.ones(tokens, 128, device=device)
        assert backend.packed_matmul(x, mix).shape == (tokens, rows)
    weight = torch.ones(3, 64, device=device)
    packed = backend.quantize_pack(weight, fmt)
    assert backend.fake_quantize(weight[:0], fmt).shape == (0, 64)
    assert backend.packed_matmul(weight[:0], pack.Operand.plain(packed, fmt, 64)).shape == (0, 3)
    none = backend.quantize_pack(weight[:0], fmt)
    assert backend.dequantize(none, fmt, 64, torch.float32).shape == (0, 64)
    assert backend.packed_matmul(weight, pack.Operand.plain(none, fmt, 64)).shape == (3, 0)
