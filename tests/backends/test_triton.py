"""The Triton kernels equal the reference: in the interpreter on any machine, and on a GPU.

Triton decides when it is imported whether it interprets. So `test_under_the_interpreter` starts
pytest on this file once more, with TRITON_INTERPRET=1; there, and on a machine with a GPU, the
tests of the operations run. Elsewhere they skip, and the kernels are compiled ahead of time for
four architectures, and their PTX is looked at.
"""

import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from checks import (
    MIXES,
    check_all_codes_and_scales,
    check_arrange,
    check_empty,
    check_matmul,
    check_mixed,
    check_round_trip,
    check_square_sums,
    check_statistics,
    each_format,
    each_kind,
)
from conftest import (
    DTYPES,
    FORMATS,
    INT_FORMATS,
    MORE_FORMATS,
    MX_FORMATS,
    assert_same_bits,
    format_id,
    hard_rows,
)
from mixes import ARRANGED

from mixbits.backends import scratch
from mixbits.formats import reference
from mixbits.formats.schemes import MX_GROUP, Format

pytest.importorskip("triton", reason="triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
needs_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="no GPU (test_under_the_interpreter runs this on the CPU)",
)
# numpy, which interprets, reports the infinities and NaNs that some inputs are there to produce.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
needs_compiler = pytest.mark.skipif(INTERPRETED, reason="Triton is interpreting")

SOME_FORMATS = FORMATS[::4]
# Of those that follow from others: one group size, one rule for the power of two.
MORE_KINDS = [
    fmt
    for fmt in MORE_FORMATS
    if fmt.scale_mode == "floor" and (fmt.scale != "float16" or fmt.group_size == 32)
]
MORE_WEIGHTS = [fmt for fmt in MORE_KINDS if fmt.tensor_scale != "row"]
MORE_ACTIVATIONS = [
    fmt for fmt in MORE_KINDS if fmt.scale != "float16" and fmt.tensor_scale != "tensor"
]


# --- the operations, interpreted or on a GPU -------------------------------------------------


@pytest.fixture
def backend() -> ModuleType:
    from mixbits.backends import triton

    assert triton.why_unavailable() is None
    assert triton.supports(DEVICE)
    return triton


@needs_device
@pytest.mark.parametrize("columns", [33, 640])
@each_format
def test_round_trip(backend, fmt, columns):
    check_round_trip(backend, DEVICE, fmt, columns)


@needs_device
@pytest.mark.parametrize("fmt", MORE_FORMATS, ids=format_id)
def test_round_trip_of_more_formats(backend, fmt):
    """Columns that end within a byte of a plane, a group, a tile; and the first tile of several."""
    assert backend.holds(fmt)
    check_round_trip(backend, DEVICE, fmt, 33, DTYPES if fmt in MORE_KINDS else DTYPES[:1])
    for columns in (1, 31, 172, 320) if fmt in MORE_KINDS else ():
        check_round_trip(backend, DEVICE, fmt, columns, DTYPES[:1])


@needs_device
@each_kind
def test_all_codes_and_scales(backend, fmt):
    check_all_codes_and_scales(backend, DEVICE, fmt)


@needs_device
def test_leading_dimensions(backend):
    x = torch.randn(2, 3, 5, 96)
    fmt = MX_FORMATS[0]
    got = backend.fake_quantize(x.to(DEVICE), fmt)
    assert_same_bits(got.cpu(), reference.fake_quantize(x, fmt))


@needs_device
@pytest.mark.parametrize("columns", [31, 172])
def test_statistics(backend, columns):
    check_statistics(backend, DEVICE, columns, FORMATS if columns > 32 else SOME_FORMATS)


@needs_device
def test_statistics_of_more_formats(backend):
    """Beside others; a scale of the whole tensor is not that of a program's tile."""
    formats = [fmt for fmt in MORE_KINDS if fmt.element not in ("int3", "int6", "e2m3")]
    formats.append(MX_FORMATS[0])
    x = torch.randn(17, 140).bfloat16()
    vectors = torch.rand(17), torch.rand(140)
    expected = reference.fisher_statistics(x, *vectors, formats)
    got = backend.fisher_statistics(*(t.to(DEVICE) for t in (x, *vectors)), formats)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-12, atol=0)
    got = backend.square_sums(x.to(DEVICE), formats)
    torch.testing.assert_close(got.cpu(), reference.square_sums(x, formats), rtol=1e-12, atol=0)


@needs_device
def test_statistics_of_hard_rows(backend):
    """Errors are exact in float32 for subnormal, huge, clamped and tied values alike."""
    for dtype in DTYPES:
        w = hard_rows(172, dtype)
        w = w[w.isfinite().all(1)]
        ones = [torch.ones(size) for size in w.shape]
        finite = [f for f in FORMATS if reference.fake_quantize(w, f).isfinite().all()]
        expected = reference.fisher_statistics(w, *ones, finite)
        got = backend.fisher_statistics(*(t.to(DEVICE) for t in (w, *ones)), finite)
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-12, atol=0)


@needs_device
@pytest.mark.parametrize("columns", [31, 172])
def test_square_sums(backend, columns):
    check_square_sums(backend, DEVICE, columns, FORMATS if columns > 32 else SOME_FORMATS)


@needs_device
@each_format
def test_matmul(backend, fmt):
    check_matmul(backend, DEVICE, fmt, (17, 66, 172))


@needs_device
@pytest.mark.parametrize("fmt", MORE_WEIGHTS, ids=format_id)
def test_matmul_of_more_formats(backend, fmt):
    check_matmul(backend, DEVICE, fmt, (17, 20, 172))
    check_matmul(backend, DEVICE, fmt, (1, 5, 33))


@needs_device
@pytest.mark.parametrize("fmt", MORE_ACTIVATIONS, ids=format_id)
def test_matmul_with_more_activations(backend, fmt):
    for weight in (MX_FORMATS[0], MORE_WEIGHTS[-1], INT_FORMATS[-1]):
        check_matmul(backend, DEVICE, weight, (3, 20, 172), activation=fmt)


@needs_device
@pytest.mark.parametrize(
    "shape", [(1, 5, 1), (3, 64, 31), (118, 65, 256), (1, 70, 1056), (257, 40, 96)], ids=str
)
@pytest.mark.parametrize("fmt", [MX_FORMATS[0], INT_FORMATS[-1]], ids=format_id)
def test_matmul_shapes(backend, fmt, shape):
    check_matmul(backend, DEVICE, fmt, shape)


@needs_device
@pytest.mark.parametrize("fmt", [MX_FORMATS[0], MX_FORMATS[3]], ids=format_id)
def test_matmul_with_activations(backend, fmt):
    check_matmul(backend, DEVICE, fmt, (3, 20, 172), activation=fmt)


@needs_device
@pytest.mark.parametrize("segments", MIXES)
def test_mixed_matmul(backend, segments):
    shapes = ((17, 100), torch.float16), ((1, 15), torch.float32), ((3, 17), torch.bfloat16)
    for (shape, dtype), arranged in zip(shapes, ARRANGED, strict=True):
        check_mixed(backend, DEVICE, segments, shape, arranged, [dtype])


@needs_device
def test_mixed_matmul_of_long_rows(backend, monkeypatch):
    """Columns that are split among programs; and the weight of many tokens, in blocks of rows."""
    segments = (("MXFP8", 160), ("MXFP4", 864))
    check_mixed(backend, DEVICE, segments, (1, 1), "rotated", [torch.bfloat16])
    check_mixed(backend, DEVICE, "integers", (118, 33), "ordered", [torch.bfloat16])
    monkeypatch.setattr(backend, "MAX_FUSED_TOKENS", 16)
    monkeypatch.setattr(scratch, "SCRATCH_BYTES", 8 * 320 * 4)
    check_mixed(backend, DEVICE, "both", (17, 33), "ordered")
    check_mixed(backend, DEVICE, "172", (118, 17), "rotated")


@needs_device
def test_mixed_matmul_of_more_formats(backend):
    """Among them activations whose rows have one scale, of a segment's columns."""
    segments = (("NVFP4", 64), ("FP8", 96), ("W5A16G32ASYM", 32), ("MXFP6xMXINT8", 44))
    shapes = ((3, 17), torch.float16), ((1, 15), torch.float32), ((17, 5), torch.bfloat16)
    for (shape, dtype), arranged in zip(shapes, ARRANGED, strict=True):
        check_mixed(backend, DEVICE, segments, shape, arranged, [dtype])


@needs_device
def test_arrange(backend):
    check_arrange(backend._kernels("arrange").arrange, DEVICE)


@needs_device
def test_empty(backend):
    check_empty(backend, DEVICE, INT_FORMATS[1])


@pytest.mark.slow
@needs_compiler
def test_under_the_interpreter():
    """This file once more, with Triton interpreting."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}  # no workers of its own
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    print(result.stdout[-2000:])
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_why_unavailable():
    from mixbits.backends import triton

    usable = INTERPRETED or torch.cuda.is_available()
    reason = triton.why_unavailable()
    assert reason is None if usable else "no CUDA device" in reason
    assert triton.supports(torch.device("cpu")) == INTERPRETED


# --- ahead-of-time compilation, without a GPU ------------------------------------------------

ARCHITECTURES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
PACKED_SIZES = {"packed_bytes": "i32", "groups": "i32", "zero_bytes": "i32"}
COMPILED_FORMATS = [Format("e2m1", 32), Format("e4m3", 32), Format("int4", 128, symmetric=False)]
TRITON_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@pytest.fixture
def compile_ptx(tmp_path, monkeypatch):
    """compile_ptx(kernel, signature, constants, options, architecture) -> PTX.

    Pointers, and integers but for those named in `odd`, are promised to be multiples of 16.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compile_one(kernel, signature, constants, options, architecture, odd=("rows",)):
        names = kernel.arg_names
        types = {name: signature.get(name, "constexpr") for name in names}
        assert {name for name, kind in types.items() if kind == "constexpr"} == set(constants)
        places = [
            place
            for i, name in enumerate(names)
            if types[name] != "constexpr" and name not in odd
            for place in places_of(i, types[name])
        ]
        attributes = {place: [["tt.divisibility", 16]] for place in places}
        source = ASTSource(kernel, types, constants, attributes)
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(
            source, target=target, options={"enable_fp_fusion": False, **options}
        )
        return compiled.asm["ptx"]

    return compile_one


def places_of(argument: int, kind: str | tuple[str, ...]) -> list[tuple[int, ...]]:
    """Of one argument, or of each member of a tuple."""
    if isinstance(kind, str):
        return [(argument,)]
    return [(argument, member) for member in range(len(kind))]


def packed_signature(fmt: Format) -> dict[str, str]:
    scale = {"float16": "*fp16", "float32": "*fp32"}.get(fmt.scale, "*u8")
    return {"packed_ptr": "*u8", "scale_ptr": scale, "zero_ptr": "*u8", **PACKED_SIZES}


def assert_exact_arithmetic(ptx: str) -> None:
    """Nothing flushes subnormals, fuses, or divides approximately."""
    for forbidden in (".ftz", "fma.rn.f32", "div.full", "div.approx", "rcp."):
        assert forbidden not in ptx, forbidden


def check_elementwise(compile_ptx, fmt: Format, architecture: int) -> None:
    """Exact arithmetic, and 16 bytes at a time, in each kernel that a format's number makes."""
    from mixbits.kernels import dequantize, fake_quant, launch, numerics
    from mixbits.kernels import pack as pack_kernels

    size = {"rows": "i32", "columns": "i32"}
    tile = {"CODE": fmt.code, "ROWS": launch.TILE_ROWS, "COLUMNS": numerics.TILE_COLUMNS}
    signature = {"x_ptr": "*bf16", "base_ptr": "*fp32", "out_ptr": "*bf16", **size}
    ptx = compile_ptx(fake_quant.fake_quantize_kernel, signature, tile, {}, architecture)
    assert_exact_arithmetic(ptx)
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx
    signature = {**packed_signature(fmt), "out_ptr": "*bf16", "stride": "i32", **size}
    signature["divisor_ptr"] = "*fp32"
    ptx = compile_ptx(dequantize.dequantize_kernel, signature, tile, {}, architecture)
    assert_exact_arithmetic(ptx)
    assert "st.global.v4.b32" in ptx
    signature = {"weight_ptr": "*bf16", "base_ptr": "*fp32", **packed_signature(fmt), **size}
    tile["COLUMNS"] = numerics.tile_columns(fmt)
    ptx = compile_ptx(pack_kernels.quantize_pack_kernel, signature, tile, {}, architecture)
    assert_exact_arithmetic(ptx)
    assert "ld.global.v4.b32" in ptx


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_elementwise_kernels_compile(compile_ptx, architecture):
    for fmt in COMPILED_FORMATS:
        check_elementwise(compile_ptx, fmt, architecture)


# Two planes with zero points, scales of a tensor, scales of rows.
MORE_COMPILED = [
    Format("int5", 32, symmetric=False),
    Format("e2m1", 16, scale="e4m3"),
    Format("e4m3", 0, scale="float32"),
]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("fmt", MORE_COMPILED, ids=format_id)
def test_kernels_of_more_formats_compile(compile_ptx, fmt):
    from mixbits.kernels import bases, gemm, launch, numerics

    check_elementwise(compile_ptx, fmt, 90)
    signature = {"x_ptr": "*bf16", "out_ptr": "*fp32", "rows": "i32", "columns": "i32"}
    constants = {"FINITE": fmt.scale == "e4m3", "ROWS": launch.TILE_ROWS}
    constants["COLUMNS"] = numerics.TILE_COLUMNS
    ptx = compile_ptx(bases.row_maxima_kernel, signature, constants, {}, 90)
    assert "ld.global.v4.b32" in ptx
    shared = gemm.shared_bytes(torch.device("cpu"))
    config = gemm.candidates(1, 4096, ((fmt, 4096),), torch.bfloat16, shared)[0]
    ptx = compile_ptx(*gemm_case(gemm, [fmt], torch.bfloat16, config), 90, odd=("m", "split_k"))
    assert ".ftz" not in ptx and ARCHITECTURES[90] in ptx


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_statistics_kernels_compile(compile_ptx, architecture):
    from mixbits.kernels import numerics, statistics

    pointers = dict.fromkeys(("weight_ptr", "gradient_ptr"), "*bf16")
    doubles = ("row_weight_ptr", "column_weight_ptr", "partial_ptr")
    pointers |= dict.fromkeys(doubles, "*fp64")
    bases = {"base_ptrs": ("*fp32",) * len(COMPILED_FORMATS)}
    signature = {**pointers, **bases, "rows": "i32", "columns": "i32", "slabs": "i32"}
    for gradient in (False, True):
        constants = {
            "CODES": tuple(fmt.code for fmt in COMPILED_FORMATS),
            "GRADIENT": gradient,
            "ROWS": statistics.STATISTICS_ROWS,
            "COLUMNS": numerics.TILE_COLUMNS,
            "SLAB": MX_GROUP,
        }
        ptx = compile_ptx(statistics.statistics_kernel, signature, constants, {}, architecture)
        assert_exact_arithmetic(ptx)
        assert "cp.async.cg.shared.global" in ptx  # tiles ahead, 16 bytes per thread
    constants = {k: v for k, v in constants.items() if k not in ("GRADIENT", "SLAB")}
    signature = {"x_ptr": "*fp32", "partial_ptr": "*fp64", "rows": "i32", "columns": "i32"} | bases
    ptx = compile_ptx(statistics.square_sums_kernel, signature, constants, {}, architecture)
    assert_exact_arithmetic(ptx)
    assert "cp.async.cg.shared.global" in ptx
    signature = {"partial_ptr": "*fp64", "out_ptr": "*fp64", "parts": "i32", "size": "i32"}
    assert compile_ptx(statistics.sum_partials_kernel, signature, {"BLOCK": 128}, {}, architecture)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gemm_compiles_to_tensor_cores(compile_ptx, architecture, dtype):
    """16-bit inputs use the architecture's matrix instructions, float32 is never TF32."""
    from mixbits.kernels import gemm

    mxfp4, mxfp8, int4 = COMPILED_FORMATS
    cases = [([fmt], m) for fmt in (mxfp4, int4) for m in (1, 64)]
    if dtype == torch.bfloat16:
        cases += [([mxfp8, mxfp4], 1), ([mxfp8, int4], 64)]
    for formats, m in cases:
        segments = tuple((fmt, 4096) for fmt in formats)
        config = gemm.candidates(m, 4096, segments, dtype, gemm.shared_bytes(torch.device("cpu")))[
            0
        ]
        ptx = compile_ptx(
            *gemm_case(gemm, formats, dtype, config), architecture, odd=("m", "split_k")
        )
        assert ".ftz" not in ptx
        if dtype == torch.bfloat16:  # loads run ahead of use, 16 bytes each
            assert "cp.async.cg.shared.global" in ptx
        if dtype == torch.float32:
            assert "tf32" not in ptx
        else:
            products = ptx.count(ARCHITECTURES[architecture]) or (m == 1 and ptx.count("mma."))
            assert products >= len(formats)


def gemm_case(gemm, formats, dtype, config):
    """Kernel, signature, constants, and launch options."""
    import triton.language as tl

    name = TRITON_DTYPES[dtype]
    constants = {field.upper(): value for field, value in config._asdict().items()}
    options = {field.lower(): constants.pop(field) for field in ("NUM_WARPS", "NUM_STAGES")}
    constants.pop("SPLIT_K")
    out = "*fp32" if config.split_k > 1 else f"*{name}"
    signature = {"x_ptr": f"*{name}", "out_ptr": out, "columns": ("i32",) * len(formats)}
    each = [{**packed_signature(fmt), "divisor_ptr": "*fp32"} for fmt in formats]
    for one in each[0]:
        plural = f"{one}s" if one.endswith("ptr") else one
        signature[plural] = tuple(types[one] for types in each)
    signature |= {"m": "i32", "n": "i32", "k": "i32", "split_k": "i32"}
    codes = tuple(fmt.code for fmt in formats)
    constants |= {"CODES": codes, "dot_dtype": getattr(tl, dtype_name(dtype))}
    return gemm.packed_matmul_kernel, signature, constants, options


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_arrange_compiles(compile_ptx, architecture):
    """Columns in order are gathered one by one, and stored 16 bytes at a time all the same."""
    from mixbits.kernels import arrange, launch, numerics

    constants = {
        "CODES": (COMPILED_FORMATS[1].code, 0),
        "ROWS": launch.TILE_ROWS,
        "COLUMNS": numerics.TILE_COLUMNS,
        "WIDTH": MX_GROUP,
    }
    signature = {"x_ptr": "*bf16", "order_ptr": "*i16", "out_ptr": "*bf16"}
    signature |= {"rows": "i32", "columns": "i32", "widths": ("i32", "i32")}
    for ordered, rotated in ((False, False), (True, True)):
        how = {"ORDERED": ordered, "ROTATED": rotated}
        ptx = compile_ptx(arrange.arrange_kernel, signature, {**constants, **how}, {}, architecture)
        assert_exact_arithmetic(ptx)
        assert "st.global.v4.b32" in ptx
        assert ("ld.global.v4.b32" in ptx) or ordered


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
