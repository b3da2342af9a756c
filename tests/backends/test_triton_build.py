"""The Triton kernels, as far as can be told without a GPU; test_triton.py runs them.

Triton decides when it is imported whether it interprets. So test_triton.py is run once more in a
process of its own, with TRITON_INTERPRET=1. And the kernels are compiled ahead of time for four
architectures, and their PTX is looked at.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DTYPES, format_id
from matrix import WRITE

from mixbits.formats.schemes import MX_GROUP, Format

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
def test_under_the_interpreter(matrix, tmp_path):
    """test_triton.py with Triton interpreting, and the cells that it compares."""
    file, cells = Path(__file__).with_name("test_triton.py"), tmp_path / "cells.json"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    env = {**os.environ, "TRITON_INTERPRET": "1", WRITE: str(cells)}
    env["PYTEST_ADDOPTS"] = ""  # no workers of its own
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    print(result.stdout[-2000:])
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    matrix.take_over(cells)


def test_why_unavailable():
    from mixbits.backends import triton

    reason = triton.why_unavailable()
    assert reason is None if torch.cuda.is_available() else "no CUDA device" in reason
    assert not triton.supports(torch.device("cpu"))


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
