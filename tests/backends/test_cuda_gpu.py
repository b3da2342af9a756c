"""The CUDA kernels on a GPU: what test_cuda_kernels.py asks of their source as host code."""

import checks
import pytest
import torch
from conftest import MX_FORMATS, format_id
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

from mixbits.backends import cuda, cuda_fp8
from mixbits.backends.cuda_choice import KernelChoice
from mixbits.formats import fp8_weights as folding

needs_gpu = pytest.mark.skipif(
    cuda.why_unavailable() is not None, reason=f"cuda backend: {cuda.why_unavailable()}"
)
GPU = torch.device("cuda")


@needs_gpu
@pytest.mark.parametrize("columns", [1, 33, 172, 640])
@checks.each_format
def test_round_trip(fmt, columns):
    checks.check_round_trip(cuda, GPU, fmt, columns)


@needs_gpu
@checks.each_kind
def test_codes_and_scales(fmt):
    checks.check_all_codes_and_scales(cuda, GPU, fmt)


@needs_gpu
@pytest.mark.parametrize("fmt", MORE_WEIGHTS, ids=format_id)
def test_dequantize(fmt):
    for columns in (1, 31, 33, 172, 4096):
        check_dequantize(cuda, GPU, fmt, columns)


@needs_gpu
@pytest.mark.parametrize("columns", [31, 172, 4096])
def test_statistics(columns):
    checks.check_statistics(cuda, GPU, columns)


@needs_gpu
@pytest.mark.parametrize(
    "shape", [(1, 5, 33), (3, 64, 256), (16, 70, 172), (118, 65, 640)], ids=str
)
@checks.each_format
def test_matmul(fmt, shape):
    checks.check_matmul(cuda, GPU, fmt, shape)


@pytest.fixture
def fp8(monkeypatch):
    return use_fp8(monkeypatch)


def skip_unless_it_runs(choice: KernelChoice) -> None:
    major, minor = cuda._device(GPU).capability
    if (major, minor) < (8, 0) or (choice.kernel in ("wgmma", "fp8") and (major, minor) != (9, 0)):
        pytest.skip(f"{choice} does not run on compute capability {major}.{minor}")


@needs_gpu
@pytest.mark.parametrize("choice", [*MMA, *WGMMA], ids=str)
@checks.each_format
def test_matrix_units(fmt, choice, monkeypatch):
    skip_unless_it_runs(choice)
    use(monkeypatch, choice)
    for shape in ((19, 69, 672), (1, 3, 32), (300, 257, 4096)):
        checks.check_matmul(cuda, GPU, fmt, shape)


@needs_gpu
@pytest.mark.parametrize("choice", [KernelChoice("simple"), *MMA], ids=str)
def test_nvfp4_matmul(choice, monkeypatch):
    skip_unless_it_runs(choice)
    use(monkeypatch, choice)
    for shape in ((11, 69, 672), (1, 3, 32), (16, 257, 4096)):
        checks.check_matmul(cuda, GPU, NVFP4, shape)


@needs_gpu
@pytest.mark.parametrize("arranged", ARRANGED)
@pytest.mark.parametrize("segments", checks.MIXES)
def test_mixed_matmul(segments, arranged):
    for shape in ((1, 15), (3, 257), (17, 100), (118, 17), (1100, 100)):
        checks.check_mixed(cuda, GPU, segments, shape, arranged)


@needs_gpu
@pytest.mark.parametrize("segments", ["MX", "integers"])
@pytest.mark.parametrize("choice", MIXED, ids=str)
def test_mixed_kernels(segments, choice, monkeypatch):
    skip_unless_it_runs(choice)
    monkeypatch.setattr(cuda, "explain", lambda x, operand: choice)
    checks.check_mixed(cuda, GPU, segments, (300, 257), "ordered", HALVES)


@needs_gpu
def test_arrange():
    checks.check_arrange(cuda._prepare_activations, GPU)


@needs_gpu
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


@needs_gpu
@pytest.mark.parametrize("columns", [33, 96, 640, 8200])
def test_fp8_tokens(columns):
    skip_unless_it_runs(FP8)
    check_fp8_tokens(GPU, columns)


@needs_gpu
@pytest.mark.parametrize("shape", [(1, 3, 32), (131, 130, 672), (300, 257, 4096)], ids=str)
def test_fp8_matmul(fp8, shape):
    skip_unless_it_runs(FP8)
    check_fp8_matmul(GPU, shape)


@needs_gpu
@each_fp8_check
def test_fp8(fp8, check):
    skip_unless_it_runs(FP8)
    check(GPU)


@needs_gpu
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


@needs_gpu
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
