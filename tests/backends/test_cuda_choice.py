"""The choice of a CUDA kernel is a pure function, and every choice can run."""

import pytest
import torch
from conftest import FORMATS, INT_FORMATS, MORE_FORMATS, MX_FORMATS, format_id

from mixbits.backends import cuda
from mixbits.backends.cuda_choice import KERNELS, Device, KernelChoice, Product, choose, choose_fp8
from mixbits.errors import UsageError
from mixbits.formats.schemes import Format

AMPERE, HOPPER, BLACKWELL = (Device((major, 0)) for major in (8, 9, 10))
TURING = Device((7, 5))
WITHOUT_WGMMA = Device((9, 0), has_wgmma=False)
MXFP4 = MX_FORMATS[0]
BF16 = torch.bfloat16


def one(fmt, dtype, tokens, rows, columns, **more) -> Product:
    """With a weight of one segment."""
    return Product((fmt,), dtype, tokens, rows, (columns,), **more)


@pytest.mark.parametrize(
    ("device", "tokens", "kernel"),
    [
        (HOPPER, 1, "mma"),
        (HOPPER, 16, "mma"),
        (HOPPER, 17, "wgmma"),
        (HOPPER, 1024, "wgmma"),
        (HOPPER, 1025, "scratch"),
        (AMPERE, 64, "mma"),
        (AMPERE, 65, "scratch"),
        (BLACKWELL, 64, "mma"),
        (BLACKWELL, 65, "scratch"),
        (TURING, 16, "simple"),
        (TURING, 17, "scratch"),
    ],
)
@pytest.mark.parametrize("fmt", [MXFP4, INT_FORMATS[0]], ids=format_id)
def test_kernels_by_device_and_tokens(fmt, device, tokens, kernel):
    assert choose(device, one(fmt, BF16, tokens, 8192, 8192)).kernel == kernel


def test_fp8_is_taken_where_it_is_allowed_and_gains(monkeypatch):
    def kernel(tokens, rows=8192, device=HOPPER, fmt=MXFP4, dtype=BF16, aligned=True, forced=None):
        product = one(fmt, dtype, tokens, rows, 8192, aligned=aligned)
        return choose_fp8(device, product, forced).kernel

    assert [kernel(tokens) for tokens in (1, 16, 128)] == ["mma", "mma", "wgmma"]
    assert [kernel(tokens) for tokens in (129, 2048, 100000)] == ["fp8"] * 3
    # A device with 132 processors wants 66 blocks of 128 rows by 128 tokens.
    assert kernel(2048, rows=512) == "scratch" and kernel(2048, rows=640) == "fp8"
    assert kernel(256, rows=1024) == "wgmma"
    assert kernel(2048, dtype=torch.float32) == "scratch"
    assert kernel(2048, device=AMPERE) == kernel(2048, device=BLACKWELL) == "scratch"
    assert kernel(2048, fmt=MX_FORMATS[4]) == kernel(2048, fmt=INT_FORMATS[0]) == "scratch"
    assert kernel(2048, aligned=False) == kernel(2048, device=WITHOUT_WGMMA) == "scratch"
    assert kernel(2048, forced="scratch") == "scratch"
    monkeypatch.setenv("MIXBITS_CUDA_KERNEL", "fp8")
    with pytest.raises(UsageError, match="must be one of simple, mma, wgmma, scratch: got 'fp8'"):
        cuda._forced_kernel()


@pytest.mark.parametrize(
    ("device", "tokens", "kernel"),
    [
        (HOPPER, 1, "mma"),
        (HOPPER, 16, "mma"),
        (HOPPER, 17, "wgmma"),
        (HOPPER, 1025, "scratch"),
        (AMPERE, 32, "mma"),
        (AMPERE, 33, "scratch"),
        (TURING, 16, "simple"),
    ],
)
@pytest.mark.parametrize(
    "formats", [(MX_FORMATS[3], MXFP4), (INT_FORMATS[-1], INT_FORMATS[0])], ids=str
)
def test_kernels_for_segments(formats, device, tokens, kernel):
    choice = choose(device, Product(formats, BF16, tokens, 8192, (2048, 6144)))
    assert choice.kernel == kernel
    assert (choice.row_tiles, choice.token_tiles) in {(0, 0), (1, 1), (4, 1)}
    assert choice.block_tokens in (0, 128)


def test_segments_that_no_matrix_kernel_takes():
    """A short last segment; float32; formats that wgmma has no common code for."""
    mx = (MX_FORMATS[3], MXFP4)
    assert choose(HOPPER, Product(mx, BF16, 3, 64, (32, 140))).kernel == "simple"
    assert choose(HOPPER, Product(mx, BF16, 40, 64, (32, 140))).kernel == "scratch"
    assert choose(HOPPER, Product(mx, torch.float32, 3, 64, (32, 64))).kernel == "simple"
    for other in (INT_FORMATS[0], MX_FORMATS[6]):
        assert choose(HOPPER, Product((other, MXFP4), BF16, 3, 64, (32, 64))).kernel == "mma"
        assert choose(HOPPER, Product((other, MXFP4), BF16, 40, 64, (32, 64))).kernel == "scratch"
    with pytest.raises(ValueError, match=r"'wgmma' .* e4m3\+e2m1 weights \[64, 172\] on compute"):
        choose(HOPPER, Product(mx, BF16, 40, 64, (32, 140)), forced="wgmma")


def test_kernels_have_no_more_formats_than_they_have_code_for():
    nvfp4 = Format("e2m1", 16, scale="e4m3")
    kernels = [choose(HOPPER, one(nvfp4, BF16, n, 64, 64)).kernel for n in (1, 64, 65)]
    assert kernels == ["mma", "mma", "scratch"]
    assert choose(TURING, one(nvfp4, BF16, 16, 64, 64)).kernel == "simple"
    mixed = Product((nvfp4, MXFP4), BF16, 16, 64, (32, 32))
    assert choose(HOPPER, mixed).kernel == "simple"
    assert choose_fp8(HOPPER, one(nvfp4, BF16, 2048, 8192, 8192)).kernel == "scratch"
    for fmt in MORE_FORMATS:
        product = one(fmt, BF16, 1, 64, 64)
        assert (choose(HOPPER, product).kernel == "scratch") == (fmt.scale != "e4m3")
        with pytest.raises(ValueError, match="'wgmma' cannot take 1 tokens"):
            choose(HOPPER, product, forced="wgmma")
        beside = Product((fmt, MXFP4, MX_FORMATS[3]), BF16, 40, 64, (32, 32, 32))
        assert choose(HOPPER, beside).kernel == "scratch"


def test_every_segment_gets_a_warp():
    for tokens, most in ((1, 16), (16, 12)):
        choice = choose(HOPPER, Product((MXFP4,) * 8, BF16, tokens, 64, (32,) * 8))
        assert 8 <= choice.warps <= most


def test_what_matrix_units_cannot_take():
    for refused in (
        choose(HOPPER, one(MXFP4, torch.float32, 4, 64, 64)),
        choose(HOPPER, one(MXFP4, BF16, 4, 64, 72)),
        choose(HOPPER, one(MXFP4, BF16, 4, 64, 64, aligned=False)),
    ):
        assert refused.kernel == "simple"
    assert choose(HOPPER, one(MXFP4, BF16, 40, 64, 72)).kernel == "scratch"
    assert choose(WITHOUT_WGMMA, one(MXFP4, BF16, 40, 64, 64)).kernel == "mma"


@pytest.mark.parametrize("fmt", FORMATS[::5], ids=format_id)
@pytest.mark.parametrize("device", [AMPERE, HOPPER], ids=str)
def test_every_choice_can_run(fmt, device):
    """Sizes are among those that csrc/cuda instantiates, and within its limits."""
    for tokens in (1, 2, 3, 8, 9, 16, 17, 64, 65, 128, 129, 256, 300, 700, 1024, 5000):
        for rows, columns in ((8192, 8192), (1024, 4096), (28672, 8192), (17, 32), (4096, 14336)):
            choice = choose(device, one(fmt, BF16, tokens, rows, columns))
            if choice.kernel == "mma":
                assert (choice.row_tiles, choice.token_tiles) in {(1, 1), (4, 1), (4, 2)}
                most = {(1, 1): 16, (4, 1): 12, (4, 2): 8}[choice.row_tiles, choice.token_tiles]
                assert 1 <= choice.warps <= most
            elif choice.kernel == "wgmma":
                assert choice.block_tokens in (64, 128, 256)
                assert choice.parts in (1, 2, 4, 8)
                assert choice.parts == 1 or choice.parts * 4 * 128 <= columns
            assert choice.kernel in str(choice)


def test_columns_are_split_to_fill_the_device():
    def parts(rows: int, columns: int, processors: int) -> int:
        device = Device((9, 0), processors)
        return choose(device, one(MXFP4, BF16, 64, rows, columns)).parts

    assert parts(8192, 8192, 132) == 2  # 64 blocks of rows
    assert parts(16384, 8192, 132) == 1
    assert parts(1024, 8192, 132) == 8
    assert parts(1024, 1024, 132) == 2  # 8 tiles of columns: 4 each


def test_forced():
    product = one(MXFP4, BF16, 16, 64, 64)
    assert {choose(HOPPER, product, kernel).kernel for kernel in KERNELS} == set(KERNELS)
    with pytest.raises(ValueError, match=r"'wgmma' cannot take 16 tokens .* capability 8\.0"):
        choose(AMPERE, product, forced="wgmma")
    with pytest.raises(ValueError, match="'simple' cannot take 17 tokens"):
        choose(HOPPER, one(MXFP4, BF16, 17, 64, 64), forced="simple")


def test_forced_by_the_environment(monkeypatch):
    monkeypatch.setenv("MIXBITS_CUDA_KERNEL", "scratch")
    assert cuda._forced_kernel() == "scratch"
    monkeypatch.setenv("MIXBITS_CUDA_KERNEL", "")
    assert cuda._forced_kernel() is None
    monkeypatch.setenv("MIXBITS_CUDA_KERNEL", "fast")
    with pytest.raises(UsageError, match="must be one of simple, mma, wgmma, scratch: got 'fast'"):
        cuda._forced_kernel()


def test_a_product_is_explained_without_tensors(monkeypatch):
    monkeypatch.setattr(cuda, "_device", lambda device: HOPPER)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for tokens in (1, 100):
        expected = str(choose(HOPPER, one(MXFP4, BF16, tokens, 4096, 8192)))
        assert cuda.explain_matmul(MXFP4, tokens, 4096, 8192, BF16) == expected


def test_choices_print():
    assert str(KernelChoice("scratch")) == "scratch (dequantized, then cuBLAS)"
    assert str(choose(HOPPER, one(MXFP4, BF16, 1, 8192, 8192))) == (
        "mma (16 rows x 8 tokens, 16 warps along K)"
    )
    assert str(choose(HOPPER, one(MXFP4, BF16, 100, 8192, 8192))) == (
        "wgmma (128 rows x 128 tokens, 2 blocks along K)"
    )
    assert str(choose_fp8(HOPPER, one(MXFP4, BF16, 2048, 8192, 8192))) == (
        "fp8 (128 rows x 128 tokens, activations in e4m3)"
    )
