"""Every backend that runs on CPU tensors through the same tests; the native library with every
instruction set that this CPU has."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from conftest import (
    CPU_FORMATS,
    CPU_PACKED,
    DTYPES,
    FORMATS,
    all_codes_and_scales,
    assert_same_bits,
    by_dtype,
    by_isa,
    format_id,
    hard_rows,
)

from mixbits import ops
from mixbits.backends import cpu
from mixbits.errors import UsageError
from mixbits.formats import reference
from mixbits.formats.pack import Packed, pack
from mixbits.formats.schemes import Format

COLUMNS = [1, 31, 33, 172, 192]
MXFP4 = Format("e2m1", 32)
MXFP8 = Format("e4m3", 32)
INT4 = Format("int4", 128)
NVFP4 = Format("e2m1", 16, scale="e4m3")
FP8 = Format("e4m3", 0, scale="float32")
INT8_ROWS = Format("int8", 0, scale="float32")


def misaligned(x):
    """The same values at an address that is a multiple of the element's size only."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)
    storage[1:] = x.flatten()
    return storage[1:].view(x.shape)


# --- rounding and packing: equal to the reference, bit for bit -----------------------------------


@lru_cache(maxsize=len(CPU_FORMATS) * len(COLUMNS))  # for its turn with every instruction set
def rounded(fmt, columns, dtype):
    x = hard_rows(columns, dtype)
    return x, misaligned(x), reference.fake_quantize(x, fmt)


@by_isa
@by_dtype
def test_fake_quantize(matrix, isa, dtype):
    for fmt in CPU_FORMATS:
        with matrix.cell("cpu", isa, "fake_quantize", fmt):
            for columns in COLUMNS:
                *inputs, expected = rounded(fmt, columns, dtype)
                for x in inputs:
                    assert_same_bits(ops.fake_quantize(x, fmt, "cpu"), expected)


@lru_cache(maxsize=len(CPU_FORMATS) * len(COLUMNS))
def packed_by_the_reference(fmt, columns, dtype):
    """A weight, its packed tensors, and their values."""
    weight = hard_rows(columns, dtype, seed=columns)
    packed = pack(reference.quantize(weight, fmt), fmt)
    return misaligned(weight), packed, ops.dequantize(packed, fmt, columns, dtype, "reference")


@by_isa
@by_dtype
def test_quantize_pack_and_dequantize(matrix, isa, dtype):
    for fmt in CPU_PACKED:
        with matrix.cell("cpu", isa, "quantize_pack", fmt):
            for columns in COLUMNS:
                weight, expected, _ = packed_by_the_reference(fmt, columns, dtype)
                packed = ops.quantize_pack(weight, fmt, "cpu")
                for got, want in zip(packed, expected, strict=True):
                    assert got is want is None or assert_same_bits(got, want) is None
        with matrix.cell("cpu", isa, "dequantize", fmt):
            for columns in COLUMNS:
                _, packed, values = packed_by_the_reference(fmt, columns, dtype)
                assert_same_bits(ops.dequantize(packed, fmt, columns, dtype, "cpu"), values)


@pytest.mark.parametrize("shape", [(2, 3, 33), (1, 1, 1, 64), (96,), (130, 1)])
def test_fake_quantize_of_any_shape(isa, shape):
    x = torch.randn(shape)
    assert_same_bits(ops.fake_quantize(x, MXFP8, "cpu"), reference.fake_quantize(x, MXFP8))


def test_fake_quantize_across_threads(isa):
    x = torch.randn(300, 1056)  # more runs than one thread takes alone
    assert_same_bits(ops.fake_quantize(x, INT4, "cpu"), reference.fake_quantize(x, INT4))


@lru_cache(maxsize=len(CPU_PACKED))
def every_code_and_scale(fmt, dtype):
    """Packed, and dequantized by the reference: e8m0 and e4m3 have 256 scales."""
    q = all_codes_and_scales(fmt)
    return pack(q, fmt), q.codes.shape[1], reference.dequantize(q, fmt, dtype)


@by_isa
@by_dtype
def test_dequantize_every_code_with_every_scale(matrix, isa, dtype):
    for fmt in CPU_PACKED:
        with matrix.cell("cpu", isa, "every code and scale", fmt):
            packed, columns, expected = every_code_and_scale(fmt, dtype)
            assert_same_bits(ops.dequantize(packed, fmt, columns, dtype, "cpu"), expected)


@lru_cache(maxsize=1)
def every_code_with_every_float16_scale(fmt):
    """Packed, and dequantized by the reference: a group of as many columns as there are codes."""
    columns = max(32, min(fmt.group_size, 1 << fmt.bits))
    half = torch.arange(65536)[:, None] % 2 * columns  # codes of 8 bits take two rows
    codes = (torch.arange(columns) + half).remainder(1 << fmt.bits).to(torch.uint8)
    codes = reference.pack_codes(codes, fmt.bits)
    scale = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)[:, None]
    zero_point = None
    if not fmt.symmetric:
        top = (1 << fmt.bits) - 1
        zero_point = (torch.arange(65536) & top).to(torch.uint8)[:, None]
        zero_point = reference.pack_codes(zero_point, fmt.bits)
    packed = Packed(codes, scale, zero_point)
    return packed, columns, ops.dequantize(packed, fmt, columns, torch.float32, "reference")


@by_isa
@pytest.mark.parametrize(
    "fmt", [f for f in CPU_FORMATS if f.scale == "float16" and f.group_size == 128], ids=format_id
)
def test_dequantize_every_code_with_every_float16_scale(isa, fmt):
    packed, columns, expected = every_code_with_every_float16_scale(fmt)
    assert_same_bits(ops.dequantize(packed, fmt, columns, torch.float32, "cpu"), expected)


@by_dtype
def test_dequantize_nvfp4(isa, dtype):
    """Every code with every scale, under another scale of the tensor."""
    scale = torch.arange(256, dtype=torch.int32).to(torch.uint8)[:, None]
    codes = torch.arange(16, dtype=torch.uint8).repeat(256, 1)
    q = reference.Quantized(codes, scale, tensor_scale=torch.tensor([1234.5]))
    got = ops.dequantize(pack(q, NVFP4), NVFP4, 16, dtype, "cpu")
    assert_same_bits(got, reference.dequantize(q, NVFP4, dtype))


@pytest.mark.parametrize("fmt", [FP8, INT8_ROWS], ids=format_id)
@by_dtype
def test_dequantize_every_code_with_scales_of_rows(isa, fmt, dtype):
    scale = torch.tensor([0.0, 1e-42, 2.0**-100, 0.3, -1.7, 3e38, torch.inf, torch.nan])[:, None]
    q = reference.Quantized(torch.arange(256).to(torch.uint8).repeat(8, 1), scale)
    got = ops.dequantize(pack(q, fmt), fmt, 256, dtype, "cpu")
    assert_same_bits(got, reference.dequantize(q, fmt, dtype))


@pytest.mark.parametrize("fmt", [NVFP4, replace(NVFP4, tensor_scale="row"), FP8], ids=format_id)
@by_dtype
def test_the_maximum_of_a_row_may_be_anywhere(isa, fmt, dtype):
    """In a vector, in what is left of the row, in a thread's other rows."""
    x = torch.rand(130, 77).to(dtype)
    x[torch.arange(130), torch.arange(130) % 77] = -9.0
    x[101, 50] = 30.0
    assert_same_bits(ops.fake_quantize(x, fmt, "cpu"), reference.fake_quantize(x, fmt))


def test_weights_have_no_scale_of_a_row_and_activations_none_of_a_tensor():
    with pytest.raises(UsageError, match="a weight has one scale of the whole tensor: got Format"):
        ops.quantize_pack(torch.ones(2, 16), replace(NVFP4, tensor_scale="row"))
    packed = ops.quantize_pack(torch.ones(2, 16), NVFP4)
    with pytest.raises(ValueError, match="rows of x share no scale of the tensor: got Format"):
        ops.packed_matmul(torch.ones(2, 16), packed, NVFP4, NVFP4)


def test_non_contiguous_input(isa):
    x = torch.randn(70, 40).T
    assert_same_bits(ops.fake_quantize(x, MXFP4, "cpu"), reference.fake_quantize(x, MXFP4))
    packed = ops.quantize_pack(x, MXFP4, "cpu")
    assert torch.equal(packed.weight_packed, ops.quantize_pack(x.contiguous(), MXFP4)[0])
    wide = Packed(packed[0].repeat(1, 2)[:, : packed[0].shape[1]], packed[1])
    expected = ops.dequantize(packed, MXFP4, 70)
    assert torch.equal(ops.dequantize(wide, MXFP4, 70, backend="cpu"), expected)
    y = ops.packed_matmul(x, wide, MXFP4, backend="cpu")
    assert torch.equal(y, ops.packed_matmul(x.contiguous(), packed, MXFP4, backend="cpu"))


# --- statistics ------------------------------------------------------------------------------


class Statistics(NamedTuple):
    """Of a weight [N, K], with its rows' and columns' importance; and one gradient per dtype."""

    weight: torch.Tensor
    importance: tuple[torch.Tensor, torch.Tensor]
    fisher: torch.Tensor
    gradients: list[torch.Tensor]
    by_gradient: list[torch.Tensor]


@lru_cache(maxsize=4)
def expected_statistics(rows, columns, dtype):
    """Of all formats, by the reference."""
    weight = (torch.randn(rows, columns) * 2.0 ** torch.randint(-30, 3, (rows, 1))).to(dtype)
    importance = torch.rand(rows), torch.rand(columns, dtype=torch.float64)
    gradients = [torch.randn(rows, columns).to(dtype) for dtype in DTYPES]
    fisher = reference.fisher_statistics(weight, *importance, CPU_FORMATS)
    found = [reference.gradient_statistics(weight, one, CPU_FORMATS) for one in gradients]
    return Statistics(weight, importance, fisher, gradients, found)


@by_isa
@by_dtype
def test_statistics(matrix, isa, dtype):
    for shape in ((1, 1), (3, 33), (65, 172), (200, 320)):
        case = expected_statistics(*shape, dtype)
        fisher = ops.fisher_statistics(case.weight, *case.importance, CPU_FORMATS, "cpu")
        found = [
            ops.gradient_statistics(case.weight, one, CPU_FORMATS, "cpu") for one in case.gradients
        ]
        for place, fmt in enumerate(CPU_FORMATS):
            with matrix.cell("cpu", isa, "fisher_statistics", fmt):
                expected = case.fisher[place]
                torch.testing.assert_close(fisher[place], expected, rtol=1e-6, atol=0)
            with matrix.cell("cpu", isa, "gradient_statistics", fmt):
                for got, want in zip(found, case.by_gradient, strict=True):
                    torch.testing.assert_close(got[place], want[place], rtol=1e-6, atol=0)


@by_dtype
def test_square_sums(matrix, isa, dtype):
    x = torch.randn(41, 172).to(dtype)
    formats = CPU_FORMATS
    expected = reference.square_sums(x, formats)
    assert expected.shape == (1 + len(formats), 172)
    got = ops.square_sums(x[:, None].transpose(0, 1)[0], formats, "cpu")
    assert torch.equal(ops.square_sums(x, formats, "reference"), expected)
    for place, fmt in enumerate(formats, 1):
        with matrix.cell("cpu", isa, "square_sums", fmt):
            # Of the same numbers, in another order.
            torch.testing.assert_close(got[place], expected[place], rtol=1e-14, atol=0)
    for backend in ("cpu", "reference"):
        alone = ops.square_sums(x, [], backend)
        torch.testing.assert_close(alone, expected[:1], rtol=1e-14, atol=0)
    wide = x.double()
    torch.testing.assert_close(got[0], (wide**2).sum(0), rtol=1e-6, atol=0)
    error = wide - reference.fake_quantize(x.float(), MXFP8).double()
    got = ops.square_sums(x, [MXFP8], "cpu")[1]
    torch.testing.assert_close(got, (error**2).sum(0), rtol=1e-6, atol=0)
    assert torch.equal(
        ops.square_sums(x[:0], formats), torch.zeros(1 + len(formats), 172, dtype=torch.float64)
    )
    with pytest.raises(ValueError, match="x must have 2 dimensions"):
        ops.square_sums(x[0], formats)


def test_statistics_do_not_depend_on_threads_or_company(isa):
    weight, gradient = torch.randn(300, 520), torch.randn(300, 520)
    row, column = torch.rand(300), torch.rand(520)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        fisher = ops.fisher_statistics(weight, row, column, FORMATS, "cpu")
        results.append((fisher, ops.gradient_statistics(weight, gradient, FORMATS, "cpu")))
    torch.set_num_threads(before)
    for fisher, gradients in results[1:]:
        assert torch.equal(fisher, results[0][0])
        assert torch.equal(gradients, results[0][1])
    alone = ops.fisher_statistics(weight, row, column, FORMATS[3:4], "cpu")
    assert torch.equal(alone[0], results[0][0][3])


def test_statistics_of_nan_are_nan_in_their_slab_only(isa):
    weight = torch.ones(4, 96)
    weight[2, 40] = torch.nan
    got = ops.gradient_statistics(weight, torch.ones(4, 96), [MXFP4], "cpu")
    assert got.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(0, 3, 64), (3, 0, 64), (3, 5, 0)])
def test_empty(isa, tokens, rows, columns):
    for fmt in (MXFP4, Format("int4", 32, symmetric=False), Format("int5", 64, symmetric=False)):
        packed = ops.quantize_pack(torch.randn(rows, columns), fmt, "cpu")
        y = ops.packed_matmul(torch.randn(tokens, columns), packed, fmt, backend="cpu")
        assert torch.equal(y, torch.zeros(tokens, rows))
        assert ops.dequantize(packed, fmt, columns, backend="cpu").shape == (rows, columns)
        assert ops.fake_quantize(torch.randn(tokens, columns), fmt).shape == (tokens, columns)
        weight = torch.randn(tokens, columns)[:rows]
        sums = ops.gradient_statistics(weight, weight, [fmt], "cpu")
        if weight.numel() == 0:
            assert torch.equal(sums, torch.zeros(1, -(-columns // 32), dtype=torch.float64))


# --- arguments -------------------------------------------------------------------------------


def test_refused_arguments():
    weight = torch.randn(4, 64)
    packed = ops.quantize_pack(weight, MXFP4)
    with pytest.raises(TypeError, match=r"x must be bfloat16, float16 or float32: got torch.int64"):
        ops.fake_quantize(torch.arange(64), MXFP4)
    with pytest.raises(ValueError, match=r"got a scalar"):
        ops.fake_quantize(torch.tensor(1.0), MXFP4)
    with pytest.raises(ValueError, match=r"weight must have 2 dimensions: got shape \(64,\)"):
        ops.quantize_pack(weight[0], MXFP4)
    with pytest.raises(ValueError, match=r"weight_packed of in_features=65, e2m1 must have shape"):
        ops.packed_matmul(torch.randn(2, 65), packed, MXFP4)
    with pytest.raises(ValueError, match=r"must have shape \(4, 64\): got \(4, 32\)"):
        ops.packed_matmul(torch.randn(2, 64), packed, MXFP8)
    with pytest.raises(ValueError, match=r"x must have 2 dimensions"):
        ops.packed_matmul(torch.randn(2, 2, 64), packed, MXFP4)
    with pytest.raises(TypeError, match=r"weight_scale must be torch.uint8: got torch.int32"):
        ops.dequantize(packed._replace(weight_scale=packed[1].int()), MXFP4, 64)
    with pytest.raises(ValueError, match=r"weight_zero_point is not part of the format"):
        ops.dequantize(packed._replace(weight_zero_point=packed[1]), MXFP4, 64)
    asymmetric = Format("int4", 32, symmetric=False)
    with pytest.raises(ValueError, match=r"weight_zero_point is missing"):
        ops.dequantize(
            ops.quantize_pack(weight, asymmetric)._replace(weight_zero_point=None), asymmetric, 64
        )
    with pytest.raises(TypeError, match=r"dtype must be .*: got torch.float64"):
        ops.dequantize(packed, MXFP4, 64, torch.float64)
    with pytest.raises(ValueError, match=r"row_weight must have shape \(4,\): got \(5,\)"):
        ops.fisher_statistics(weight, torch.ones(5), torch.ones(64), [MXFP4])
    with pytest.raises(TypeError, match=r"column_weight must be of a float dtype: got torch.int64"):
        ops.fisher_statistics(weight, torch.ones(4), torch.ones(64, dtype=torch.int64), [MXFP4])
    with pytest.raises(ValueError, match=r"gradient must have shape \(4, 64\): got \(64, 4\)"):
        ops.gradient_statistics(weight, weight.T, [MXFP4])
    with pytest.raises(ValueError, match=r"gradient must be on cpu as the other tensors: got meta"):
        ops.gradient_statistics(weight, weight.to("meta"), [MXFP4])


def test_backend_choice(monkeypatch):
    x = torch.randn(2, 64)
    assert set(ops.backends()) == {"cuda", "triton", "cpu", "reference"}
    assert ops.backends()["reference"] is None
    assert ops.choose_backend("cpu", "reference") == "reference"
    assert ops.choose_backend("meta", None) == "reference"
    with pytest.raises(UsageError, match=r"backend must be one of cuda, .*: got 'tpu'"):
        ops.fake_quantize(x, MXFP4, "tpu")
    monkeypatch.setenv("MIXBITS_BACKEND", "tpu")
    with pytest.raises(UsageError, match=r"got 'tpu'"):
        ops.fake_quantize(x, MXFP4)
    assert ops.fake_quantize(x, MXFP4, "reference").shape == x.shape  # the argument comes first


def test_the_way_of_a_product_can_be_asked_for(monkeypatch):
    assert ops.explain_matmul("cpu", MXFP4, 1, 64, 64, backend="reference") == "reference"
    monkeypatch.setattr(cpu, "explain_matmul", lambda *args: f"way {args[1:4]}", raising=False)
    assert ops.explain_matmul("cpu", MXFP4, 1, 64, 32, backend="cpu") == "cpu: way (1, 64, 32)"
    monkeypatch.setenv("MIXBITS_BACKEND", "reference")
    assert ops.explain_matmul("cpu", MXFP4, 1, 64, 64) == "reference"
    monkeypatch.setenv("MIXBITS_BACKEND", "none")
    with pytest.raises(UsageError, match="backend must be one of"):
        ops.explain_matmul("cpu", MXFP4, 1, 64, 64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU makes these backends usable")
def test_forced_backend_says_why_not():
    with pytest.raises(UsageError, match=r"backend 'cuda' cannot be used: .+"):
        ops.fake_quantize(torch.randn(2, 64), MXFP4, "cuda")


def run_python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    )


def test_isa_from_the_environment():
    if not cpu.available_isas():
        pytest.skip(str(cpu.why_unavailable()))
    code = (
        "import importlib, os\n"
        "from mixbits.backends import cpu\n"
        "print(cpu.isa())\n"
        "os.environ['MIXBITS_ISA'] = 'neon'\n"
        "importlib.reload(cpu)"
    )
    done = run_python(code, MIXBITS_ISA="scalar")
    assert done.stdout.strip() == "scalar"
    assert "instruction set must be one of" in done.stderr and "got neon" in done.stderr
    with pytest.raises(UsageError, match=r"instruction set must be one of .*scalar: got mmx"):
        cpu.set_isa("mmx")


def test_without_the_native_library():
    code = (
        "import sys; sys.modules['mixbits._cpu'] = None\n"
        "import torch\n"
        "from mixbits import ops\n"
        "from mixbits.formats.schemes import Format\n"
        "print(ops.backends()['cpu'], '|', ops.choose_backend('cpu', None))\n"
        "print(ops.fake_quantize(torch.ones(1, 3), Format('e2m1', 32)).tolist())"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    why, values = result.stdout.strip().splitlines()
    assert "not built" in why and why.endswith("| reference")
    assert values == "[[1.0, 1.0, 1.0]]"


# --- torch.library -----------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [MXFP4, Format("int4", 32, symmetric=False)], ids=format_id)
def test_opcheck(fmt):
    x, packed = torch.randn(3, 64), ops.quantize_pack(torch.randn(5, 64), fmt)
    torch.library.opcheck(torch.ops.mixbits.fake_quantize.default, (x, fmt.code))
    torch.library.opcheck(
        torch.ops.mixbits.packed_matmul.default, (x, *packed, fmt.code, MXFP4.code)
    )


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_without_graph_breaks(backend):
    torch._dynamo.reset()
    packed = ops.quantize_pack(torch.randn(5, 64), MXFP4)

    def function(x):
        return ops.packed_matmul(ops.fake_quantize(x + 1, MXFP8), packed, MXFP4, MXFP4) * 2

    x = torch.randn(3, 64)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x), function(x))
