"""The CUDA kernels run: their own source as host code, on any machine.

tests/backends/emulation stands in for the CUDA headers and for csrc/cuda/ptx.cuh. What it shows is
that indexing, fragment layouts, swizzles and the order of barriers are right; what only a GPU can
show (test_cuda_gpu.py) is that the instructions do what the stand-in takes them to do, and speed.
"""

import importlib.machinery
import importlib.util
import sys
from contextlib import nullcontext

import checks
import pytest
import torch
from compiled import needs_gpp
from conftest import (
    FLOATS,
    FORMATS,
    INT_FORMATS,
    INTS,
    MORE_FORMATS,
    MX_FORMATS,
    assert_same_bits,
    format_id,
    hard_rows,
)
from cuda_checks import MIXED, MMA, MORE_WEIGHTS, NVFP4, WGMMA, check_dequantize, plain, use
from emulator import build_emulation
from fp8_checks import (
    HALVES,
    MXFP4,
    check_fp8_matmul,
    check_fp8_tokens,
    each_fp8_check,
    use_fp8,
)
from mixes import ARRANGED, make_mix
from refusals import check_refusals, check_twins
from torch import Tensor

from mixbits import ops
from mixbits.backends import cuda, cuda_choice, cuda_fp8, scratch
from mixbits.backends.cuda_choice import Device, KernelChoice
from mixbits.formats import fp8_weights as folding
from mixbits.formats import pack, reference
from mixbits.formats.recipes import parse_recipe
from mixbits.formats.schemes import MAX_SEGMENTS, MX_GROUP, Format
from mixbits.runtime.linear import PackedLinear, allow_fp8_activations

# --- emulate ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    """The extension module of the kernels as host code."""
    pytest.importorskip("pybind11")
    library = build_emulation(tmp_path_factory.mktemp("emulation"))
    before = sys.modules.get("mixbits._cuda")
    spec = importlib.util.spec_from_file_location("mixbits._cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop("mixbits._cuda", None)
    if before is not None:
        sys.modules["mixbits._cuda"] = before
    return module


@pytest.fixture
def emulated(emulation, monkeypatch):
    """The cuda backend on CPU tensors: the emulated kernels of an H100, no stream, no device."""
    monkeypatch.setattr(cuda, "_native", lambda: emulation)
    monkeypatch.setattr(cuda, "_stream", lambda x: 0)
    monkeypatch.setattr(cuda, "_device", lambda device: Device((9, 0)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return cuda


CPU = torch.device("cpu")
EMULATED_FORMATS = [MX_FORMATS[0], MX_FORMATS[4], MX_FORMATS[8]]
EMULATED_FORMATS += [f for f in INT_FORMATS if f.symmetric == (f.group_size == 64)]
STATISTICS = ("fisher_statistics", "gradient_statistics", "square_sums")
each_emulated_format = pytest.mark.parametrize("fmt", EMULATED_FORMATS, ids=format_id)


def emulated_test(test):
    return pytest.mark.slow(needs_gpp(test))


@emulated_test
def test_emulated_round_trip(emulated, matrix):
    cell = checks.cells(matrix, emulated, CPU)
    for fmt in FORMATS:
        with cell(checks.ROUND_TRIP, fmt):
            for columns in (33, 640) if fmt in EMULATED_FORMATS else (33,):
                checks.check_round_trip(emulated, CPU, fmt, columns)


SHAPES = [(1, 5, 33), (3, 17, 172), (11, 18, 640), (17, 9, 65)]


@emulated_test
def test_emulated_matmul(emulated, matrix, monkeypatch):
    """As the backend chooses: all ways but wgmma occur, and scratch in several blocks."""
    monkeypatch.setattr(scratch, "SCRATCH_BYTES", 4 * 64 * 4)  # four float32 rows
    cell = checks.cells(matrix, emulated, CPU)
    for fmt in checks.WEIGHTS:
        with cell("packed_matmul", fmt):
            for shape in SHAPES if fmt in checks.KINDS else SHAPES[:2]:
                checks.check_matmul(emulated, CPU, fmt, shape)


@emulated_test
def test_emulated_matmul_of_rounded_tokens(emulated, matrix):
    cell = checks.cells(matrix, emulated, CPU)
    for fmt in FORMATS:
        with cell("activations", fmt):
            for weight in (MX_FORMATS[0], INT_FORMATS[-1]):
                checks.check_matmul(emulated, CPU, weight, (3, 5, 172), activation=fmt)


@emulated_test
def test_emulated_codes_and_scales(emulated, matrix):
    cell = checks.cells(matrix, emulated, CPU)
    for fmt in checks.WEIGHTS:
        assert emulated.decodes(fmt)
        with cell("every code and scale", fmt):
            checks.check_all_codes_and_scales(emulated, CPU, fmt)


@emulated_test
def test_emulated_dequantize(emulated, matrix):
    cell = checks.cells(matrix, emulated, CPU)
    for fmt in MORE_WEIGHTS:
        with cell("dequantize", fmt):
            for columns in (1, 31, 33, 172, 320):
                check_dequantize(emulated, CPU, fmt, columns)


@emulated_test
def test_emulated_mixed_of_more_formats(emulated):
    for segments in (
        (("NVFP4A16", 64), ("MXFP4A16", 76)),
        (("NVFP4A16", 64), ("MXFP4", 32), ("W5A16G32ASYM", 44)),
    ):
        for shape in ((3, 17), (17, 9)):
            checks.check_mixed(emulated, CPU, segments, shape, "ordered")


@emulated_test
def test_emulated_kernels_without_code_for_a_format_say_so(emulated):
    """Nothing is launched that would leave an output as it was."""
    x = torch.ones(2, 64)
    for fmt in MORE_FORMATS:
        if fmt.group_size > 32 or fmt.scale_mode != "floor":
            continue
        refused = pytest.raises(RuntimeError, match="no code for this format")
        assert not emulated.holds(fmt)
        with refused:
            emulated.fake_quantize(x, fmt)
        with refused:
            emulated.fisher_statistics(x, torch.ones(2), torch.ones(64), [MX_FORMATS[0], fmt])
        if fmt.tensor_scale == "row":
            continue
        with refused:
            emulated.quantize_pack(x, fmt)
        packed = pack.pack(reference.quantize(x, fmt), fmt)
        both = pack.Operand((pack.Part(packed, fmt), pack.Part(packed, fmt)), (64, 64))
        choices = [MIXED[1], MIXED[2], KernelChoice("simple")]
        for choice in choices[: 2 if fmt == NVFP4 else 3]:
            dtype = torch.float32 if choice.kernel == "simple" else torch.bfloat16
            with refused:
                emulated.packed_matmul(torch.ones(2, 128, dtype=dtype), both, choice)
            if choice.kernel == "wgmma" or fmt != NVFP4:
                with refused:
                    one = pack.Operand.plain(packed, fmt, 64)
                    emulated.packed_matmul(x.to(dtype), one, choice)
    mxfp4 = emulated.quantize_pack(x, MX_FORMATS[0])
    ordered = pack.Operand(
        (pack.Part(mxfp4, MX_FORMATS[0], Format("e2m3", 32)),), (64,), torch.arange(64).byte()
    )
    with pytest.raises(RuntimeError, match="no code for this format"):
        emulated.packed_matmul(x, ordered)


@emulated_test
def test_emulated_statistics(emulated, matrix):
    checks.check_statistics(emulated, CPU, 172)  # of more formats than one pass takes
    checks.check_square_sums(emulated, CPU, 172)
    for fmt in FORMATS:
        with checks.cells(matrix, emulated, CPU)(STATISTICS, fmt):
            pass


@emulated_test
def test_emulated_refusals(emulated, matrix, chosen_anew, monkeypatch):
    """What has no kernel is refused before any is called, and compensation has none."""
    monkeypatch.setattr(cuda, "why_unavailable", lambda: None)
    monkeypatch.setattr(cuda, "supports", lambda device: True)
    check_refusals(matrix, "cuda", "emulated")
    check_twins(matrix, "cuda", "emulated")


@emulated_test
def test_emulated_empty(emulated):
    checks.check_empty(emulated, CPU, INT_FORMATS[1])


@emulated_test
def test_limits_are_those_that_python_knows(emulation):
    assert emulation.MAX_SEGMENTS == MAX_SEGMENTS
    assert emulation.MAX_TOKENS == cuda_choice.SIMPLE_TOKENS
    assert emulation.MIXED_TOKENS == cuda_choice.MIXED_TOKENS
    assert emulation.E4M3_TOKENS == cuda_choice.FP8_TOKENS


# --- the matrix units ------------------------------------------------------------------------


@emulated_test
@pytest.mark.parametrize("choice", [*MMA, WGMMA[0], WGMMA[1]], ids=str)
@each_emulated_format
def test_emulated_matrix_units(emulated, fmt, choice, monkeypatch):
    """Rows, tokens and columns that fill no tile; groups that end within the last one."""
    use(monkeypatch, choice)
    checks.check_matmul(emulated, CPU, fmt, (19, 69, 672))
    checks.check_matmul(emulated, CPU, fmt, (1, 3, 32))


@emulated_test
@pytest.mark.parametrize("choice", MMA, ids=str)
def test_emulated_matrix_units_with_nvfp4(emulated, choice, monkeypatch):
    """All scales times all codes are exact in 16 bits; NaN scales and those of both signs too."""
    use(monkeypatch, choice)
    checks.check_matmul(emulated, CPU, NVFP4, (19, 69, 672))
    checks.check_matmul(emulated, CPU, NVFP4, (1, 3, 32))
    q = checks.all_codes_and_scales(NVFP4)._replace(tensor_scale=torch.ones(1))
    for dtype in HALVES:
        w = reference.dequantize(q, NVFP4, dtype)
        expected = torch.eye(64, dtype=torch.float64) @ w.double().T  # NaN * 0 is NaN
        got = dequantized(emulated, pack.pack(q, NVFP4), NVFP4, 64, dtype)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=0, equal_nan=True)


@emulated_test
@pytest.mark.parametrize("choice", WGMMA[2:], ids=str)
@pytest.mark.parametrize("fmt", [MX_FORMATS[0], INT_FORMATS[-1]], ids=format_id)
def test_emulated_wide_blocks(emulated, fmt, choice, monkeypatch):
    use(monkeypatch, choice)
    checks.check_matmul(emulated, CPU, fmt, (choice.block_tokens + 3, 130, 1056))


@emulated_test
@pytest.mark.parametrize("choice", MIXED, ids=str)
@pytest.mark.parametrize("segments", ["MX", "MX, inputs alone", "integers"])
def test_emulated_mixed(emulated, segments, choice, monkeypatch):
    """Segments that fill no tile; rows and tokens likewise."""
    monkeypatch.setattr(cuda, "explain", lambda x, operand: choice)
    checks.check_mixed(emulated, CPU, segments, (17, 69), "ordered", [torch.bfloat16])
    checks.check_mixed(emulated, CPU, segments, (1, 1), dtypes=[torch.float16])


@emulated_test
@pytest.mark.parametrize("segments", checks.MIXES)
def test_emulated_mixed_as_chosen(emulated, segments, monkeypatch):
    """All ways but wgmma's occur, and scratch in several blocks."""
    monkeypatch.setattr(scratch, "SCRATCH_BYTES", 8 * 320 * 4)
    for shape, arranged in zip(((1, 15), (3, 100), (17, 17)), ARRANGED, strict=True):
        checks.check_mixed(emulated, CPU, segments, shape, arranged)


@emulated_test
@pytest.mark.parametrize("tokens", [12, 40, 130])
def test_emulated_one_arranged_segment(emulated, tokens):
    """It takes the kernels of a plain weight, in sizes that several segments do not have."""
    for segments in ((("MXFP4", 160),), (("W4A16", 160),)):
        checks.check_mixed(emulated, CPU, segments, (tokens, 69), "ordered", [torch.bfloat16])
    mix, _ = checks.make_mix((("MXFP4", 160),), "ordered", 69)
    choice = cuda.explain(torch.zeros(tokens, 160, dtype=torch.bfloat16), mix)
    sizes = {12: (4, 2, 0), 40: (0, 0, 64), 130: (0, 0, 256)}[tokens]
    assert (choice.row_tiles, choice.token_tiles, choice.block_tokens) == sizes


@emulated_test
def test_emulated_arrange(emulated):
    checks.check_arrange(cuda._prepare_activations, CPU)


@emulated_test
def test_emulated_mixed_misaligned(emulated):
    """Codes that begin anywhere take narrower loads; an input that does is prepared."""
    mix, _ = make_mix(checks.MIXES["MX, inputs alone"], "natural", 5)
    x = torch.randn(3 * 224 + 1).bfloat16()[1:].view(3, 224)
    expected = cuda.packed_matmul(x, mix)
    codes = mix.parts[1].packed.weight_packed
    shifted = torch.empty(codes.numel() + 1, dtype=torch.uint8)[1:].view(codes.shape).copy_(codes)
    packed = mix.parts[1].packed._replace(weight_packed=shifted)
    moved = mix._replace(parts=(mix.parts[0], mix.parts[1]._replace(packed=packed)))
    assert cuda.explain(x, mix).kernel == "mma"
    assert cuda.explain(x, moved).kernel == "simple"
    torch.testing.assert_close(cuda.packed_matmul(x, moved), expected)


@emulated_test
@pytest.mark.parametrize("choice", [MMA[1], WGMMA[0]], ids=str)
@pytest.mark.parametrize("fmt", [MX_FORMATS[0], MX_FORMATS[5], MX_FORMATS[8]], ids=format_id)
def test_emulated_activations(emulated, fmt, choice, monkeypatch):
    use(monkeypatch, choice)
    checks.check_matmul(emulated, CPU, fmt, (5, 20, 160), activation=fmt)
    # Rounding x inside the product is rounding it before: the same bits.
    w = emulated.quantize_pack(torch.randn(20, 160), fmt)
    for dtype in HALVES:
        x = hard_rows(160, dtype)
        got = emulated.packed_matmul(x, plain(w, fmt, fmt))
        assert_same_bits(got, emulated.packed_matmul(emulated.fake_quantize(x, fmt), plain(w, fmt)))


def dequantized(emulated, packed: pack.Packed, fmt: Format, columns: int, dtype) -> Tensor:
    """The weights [K, N] that a product uses: those of the identity."""
    eye = torch.eye(columns, dtype=dtype)
    return emulated.packed_matmul(eye, plain(packed, fmt))


@emulated_test
@pytest.mark.parametrize("choice", [MMA[0], WGMMA[0]], ids=str)
@pytest.mark.parametrize("element", FLOATS)
def test_emulated_units_take_every_code_and_scale(emulated, element, choice, monkeypatch):
    """Row s has scale s and all codes but NaNs; then one NaN code per row."""
    use(monkeypatch, choice)
    fmt = Format(element, MX_GROUP)
    q, bad = checks.every_scale_and_code(fmt)
    columns = q.codes.shape[1]
    for dtype in HALVES:
        w = reference.dequantize(q, fmt, dtype)
        expected = torch.eye(columns, dtype=torch.float64) @ w.double().T  # NaN * 0 is NaN
        got = dequantized(emulated, pack.pack(q, fmt), fmt, columns, dtype)
        # Two roundings of float16 below its normal numbers may differ from one by a last digit.
        atol = 0.0 if dtype == torch.bfloat16 else 2.0**-24
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=atol, equal_nan=True)
    q.codes[: len(bad), 17] = bad
    q.scale[: len(bad)] = 120
    got = dequantized(emulated, pack.pack(q, fmt), fmt, columns, torch.bfloat16)
    assert got[:, : len(bad)].isnan().all()
    assert not got[:, len(bad) : 200].isnan().any()  # scales that overflow come later


@emulated_test
@pytest.mark.parametrize("choice", [MMA[0], WGMMA[0]], ids=str)
@pytest.mark.parametrize("element", INTS)
def test_emulated_units_take_every_integer(emulated, element, choice, monkeypatch):
    """All codes and zero points, scales of all sizes: weights are rounded once to x's dtype."""
    use(monkeypatch, choice)
    fmt = Format(element, 128, symmetric=False)
    q = checks.every_zero_point_and_code(fmt)
    exact = reference.dequantize(q, fmt, torch.float32).double().T
    for dtype in HALVES:
        got = dequantized(emulated, pack.pack(q, fmt), fmt, 256, dtype).double()
        # Half a last digit; in bfloat16 the product with the scale's lower digits was rounded too.
        half_digit = torch.finfo(dtype).eps / 2 * (1 + 2.0**-6)
        assert ((got - exact).abs() <= half_digit * exact.abs() + 2.0**-25).all()


@emulated_test
def test_emulated_misaligned_codes(emulated):
    """A slice of a larger tensor may begin anywhere: a kernel with narrower loads takes it."""
    fmt = MX_FORMATS[0]
    whole = emulated.quantize_pack(torch.randn(6, 96), fmt)
    part = pack.Packed(whole.weight_packed[1:], whole.weight_scale[1:])
    shifted = torch.empty(5 * 48 + 1, dtype=torch.uint8)[1:].view(5, 48)
    shifted.copy_(part.weight_packed)
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    part = pack.Packed(shifted, part.weight_scale)
    assert emulated.explain(x, plain(part, fmt)).kernel == "simple"
    got = emulated.packed_matmul(x, plain(part, fmt))
    aligned = pack.Packed(shifted.clone(), part.weight_scale)
    torch.testing.assert_close(got, emulated.packed_matmul(x, plain(aligned, fmt)))


# --- activations in 8-bit floats -------------------------------------------------------------


@pytest.fixture
def fp8(monkeypatch):
    return use_fp8(monkeypatch)


@emulated_test
@pytest.mark.parametrize("columns", [33, 96, 640])
def test_emulated_fp8_tokens(emulated, columns):
    check_fp8_tokens(CPU, columns)


@emulated_test
@pytest.mark.parametrize("shape", [(1, 3, 32), (131, 69, 672), (19, 133, 1056)], ids=str)
def test_emulated_fp8_matmul(emulated, fp8, shape):
    check_fp8_matmul(CPU, shape)


@emulated_test
@each_fp8_check
def test_emulated_fp8(emulated, fp8, check):
    check(CPU)


@emulated_test
def test_emulated_fp8_is_left_to_others_where_nothing_is_gained(emulated):
    """Few tokens, float32, and codes that no chunk can be loaded from: the same bits as without."""
    packed = emulated.quantize_pack(torch.randn(6, 96), MXFP4)
    row_scale = folding.fold_rows(packed)
    for x in (torch.randn(3, 96, dtype=torch.bfloat16), torch.randn(200, 96)):
        got = cuda_fp8.packed_matmul(x, packed, MXFP4, row_scale)
        assert_same_bits(got, emulated.packed_matmul(x, plain(packed, MXFP4)))


@emulated_test
def test_emulated_fp8_linear(emulated, fp8, monkeypatch):
    """A linear that allows it, with a bias, for x of three dimensions."""
    monkeypatch.setattr(ops, "choose_backend", lambda device_type, requested: "cuda")
    bias = torch.nn.Parameter(torch.randn(6, dtype=torch.bfloat16), requires_grad=False)
    linear = PackedLinear.from_weight(torch.randn(6, 96), parse_recipe("MXFP4A16"), bias)
    allow_fp8_activations(linear)
    x = torch.randn(2, 5, 96, dtype=torch.bfloat16)
    expected = folding.matmul(
        x.view(10, 96), linear.operand.parts[0].packed, linear.row_scale
    ).view(2, 5, 6)
    torch.testing.assert_close(linear(x), expected + bias, rtol=2.0**-7, atol=2.0**-7)
    assert linear(x[:, :0]).shape == (2, 0, 6)
