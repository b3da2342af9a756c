"""The CUDA kernels on a GPU: what test_cuda_kernels.py asks of their source as host code."""

import checks
import pytest
import torch
from conftest import FORMATS, INT_FORMATS, MX_FORMATS
from cuda_checks import MIXED, MMA, MORE_WEIGHTS, NVFP4, WGMMA, check_dequantize, plain, use
from fp8_checks import (
    FP8,
    HALVES,
    MXFP4,
    check_fp8_matmul,
    check_fp8_tokens,
    each_fp8_check,
    use_fp8,
)
from mixes import ARRANGED
from refusals import check_refusals, check_twins

from mixbits.backends import cuda, cuda_fp8
from mixbits.backends.cuda_choice import KernelChoice
from mixbits.formats import fp8_weights as folding

if why := cuda.why_unavailable():
    pytest.skip(f"cuda backend: {why}", allow_module_level=True)
GPU = torch.device("cuda")


@pytest.fixture
def cell(matrix):
    return checks.cells(matrix, cuda, GPU)


def test_round_trip(cell):
    for fmt in FORMATS:
        with cell(checks.ROUND_TRIP, fmt):
            for columns in (1, 33, 172, 640):
                checks.check_round_trip(cuda, GPU, fmt, columns)


def test_codes_and_scales(cell):
    for fmt in checks.WEIGHTS:
        with cell("every code and scale", fmt):
            checks.check_all_codes_and_scales(cuda, GPU, fmt)


def test_dequantize(cell):
    for fmt in MORE_WEIGHTS:
        with cell("dequantize", fmt):
            for columns in (1, 31, 33, 172, 4096):
                check_dequantize(cuda, GPU, fmt, columns)


def test_statistics(cell):
    for columns in (31, 172, 4096):
        checks.check_statistics(cuda, GPU, columns)
        checks.check_square_sums(cuda, GPU, columns)
    for fmt in FORMATS:
        with cell(("fisher_statistics", "gradient_statistics", "square_sums"), fmt):
            pass


@pytest.mark.parametrize(
    "shape", [(1, 5, 33), (3, 64, 256), (16, 70, 172), (118, 65, 640)], ids=str
)
def test_matmul(cell, shape):
    for fmt in checks.WEIGHTS:
        with cell("packed_matmul", fmt):
            checks.check_matmul(cuda, GPU, fmt, shape)


def test_matmul_of_rounded_tokens(cell):
    for fmt in FORMATS:
        with cell("activations", fmt):
            for weight in (MX_FORMATS[0], INT_FORMATS[-1]):
                checks.check_matmul(cuda, GPU, weight, (3, 5, 172), activation=fmt)


def test_refusals(matrix):
    check_refusals(matrix, "cuda", "GPU", "cuda")
    check_twins(matrix, "cuda", "GPU")


@pytest.fixture
def fp8(monkeypatch):
    return use_fp8(monkeypatch)


def skip_unless_it_runs(choice: KernelChoice) -> None:
    major, minor = cuda._device(GPU).capability
    if (major, minor) < (8, 0) or (choice.kernel in ("wgmma", "fp8") and (major, minor) != (9, 0)):
        pytest.skip(f"{choice} does not run on compute capability {major}.{minor}")


@pytest.mark.parametrize("choice", [*MMA, *WGMMA], ids=str)
@checks.each_format
def test_matrix_units(fmt, choice, monkeypatch):
    skip_unless_it_runs(choice)
    use(monkeypatch, choice)
    for shape in ((19, 69, 672), (1, 3, 32), (300, 257, 4096)):
        checks.check_matmul(cuda, GPU, fmt, shape)


@pytest.mark.parametrize("choice", [KernelChoice("simple"), *MMA], ids=str)
def test_nvfp4_matmul(choice, monkeypatch):
    skip_unless_it_runs(choice)
    use(monkeypatch, choice)
    for shape in ((11, 69, 672), (1, 3, 32), (16, 257, 4096)):
        checks.check_matmul(cuda, GPU, NVFP4, shape)


@pytest.mark.parametrize("arranged", ARRANGED)
@pytest.mark.parametrize("segments", checks.MIXES)
def test_mixed_matmul(segments, arranged):
    for shape in ((1, 15), (3, 257), (17, 100), (118, 17), (1100, 100)):
        checks.check_mixed(cuda, GPU, segments, shape, arranged)


@pytest.mark.parametrize("segments", ["MX", "integers"])
@pytest.mark.parametrize("choice", MIXED, ids=str)
def test_mixed_kernels(segments, choice, monkeypatch):
    skip_unless_it_runs(choice)
    monkeypatch.setattr(cuda, "explain", lambda x, operand: choice)
    checks.check_mixed(cuda, GPU, segments, (300, 257), "ordered", HALVES)


def test_arrange():
    checks.check_arrange(cuda._prepare_activations, GPU)


@pytest.mark.parametrize("choice", [MMA[2], *WGMMA], ids=str)
def test_same_bits_every_time(choice, monkeypatch):
    """Many blocks, long rows: a race would move a bit now and then. fake_quantize may be fused."""
    skip_unless_it_runs(choice)
    use(monkeypatch, choice)
    fmt = MX_FORMATS[0]
    packed = cuda.quantize_pack(torch.randn(4096, 4096, device=GPU), fmt)
    x = torch.randn(200, 4096, device=GPU, dtype=torch.bfloat16)
    first = cuda.packed_matmul(x, plain(packed, fmt, fmt))
    for _ in range(50):
        assert torch.equal(first, cuda.packed_matmul(x, plain(packed, fmt, fmt)))
    assert torch.equal(first, cuda.packed_matmul(cuda.fake_quantize(x, fmt), plain(packed, fmt)))


@pytest.mark.parametrize("columns", [33, 96, 640, 8200])
def test_fp8_tokens(columns):
    skip_unless_it_runs(FP8)
    check_fp8_tokens(GPU, columns)


@pytest.mark.parametrize("shape", [(1, 3, 32), (131, 130, 672), (300, 257, 4096)], ids=str)
def test_fp8_matmul(fp8, shape):
    skip_unless_it_runs(FP8)
    check_fp8_matmul(GPU, shape)


@each_fp8_check
def test_fp8(fp8, check):
    skip_unless_it_runs(FP8)
    check(GPU)


def test_fp8_has_the_same_bits_every_time():
    """Chosen by itself for many tokens, captured and eager."""
    skip_unless_it_runs(FP8)
    packed = cuda.quantize_pack(torch.randn(4096, 4096, device=GPU), MXFP4)
    row_scale = folding.fold_rows(packed)
    x = torch.randn(700, 4096, device=GPU, dtype=torch.bfloat16)
    assert cuda_fp8.explain(x, packed, MXFP4) == FP8
    first = cuda_fp8.packed_matmul(x, packed, MXFP4, row_scale)
    for _ in range(50):
        assert torch.equal(first, cuda_fp8.packed_matmul(x, packed, MXFP4, row_scale))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda_fp8.packed_matmul(x, packed, MXFP4, row_scale)
    graph.replay()
    assert torch.equal(first, out)


@pytest.mark.parametrize("tokens", [1, 3, 40, 200, 1100])
def test_graph_replay(tokens):
    """A captured product gives the bits of an eager one, on new input in the same place."""
    fmt = MX_FORMATS[0]
    packed = cuda.quantize_pack(torch.randn(256, 512, device=GPU), fmt)
    x = torch.randn(tokens, 512, device=GPU, dtype=torch.bfloat16)
    cuda.packed_matmul(x, plain(packed, fmt, fmt))  # cuBLAS sets itself up outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda.packed_matmul(x, plain(packed, fmt, fmt))
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, cuda.packed_matmul(x, plain(packed, fmt, fmt)))
