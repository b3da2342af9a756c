"""The Triton kernels equal the reference: in the interpreter on any machine, and on a GPU.

On a machine without a GPU this file skips, until test_triton_build.py starts it with
TRITON_INTERPRET=1.
"""

import os
from types import ModuleType

import pytest
import torch
from checks import (
    ALL,
    KINDS,
    MIXES,
    ROUND_TRIP,
    WEIGHTS,
    cells,
    check_all_codes_and_scales,
    check_arrange,
    check_empty,
    check_matmul,
    check_mixed,
    check_round_trip,
    check_square_sums,
    check_statistics,
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
from refusals import check_refusals, check_twins

from mixbits.backends import scratch
from mixbits.formats import reference

pytest.importorskip("triton", reason="triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    reason = "no GPU (test_triton_build.py has this file interpreted)"
    pytest.skip(reason, allow_module_level=True)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# numpy, which interprets, reports the infinities and NaNs that some inputs are there to produce.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SOME_FORMATS = FORMATS[::4]
# Kernels compute in float32 whatever they load: interpreted, other dtypes are tried of some.
MAYBE_ALL_DTYPES = DTYPES[:1] if INTERPRETED else DTYPES
# Of those that follow from others: one group size, one rule for the power of two.
MORE_KINDS = [
    fmt
    for fmt in MORE_FORMATS
    if fmt.scale_mode == "floor" and (fmt.scale != "float16" or fmt.group_size == 32)
]
MORE_WEIGHTS = [fmt for fmt in MORE_KINDS if fmt.tensor_scale != "row"]
KINDS_OF_ACTIVATIONS = [
    fmt for fmt in MORE_KINDS if fmt.scale != "float16" and fmt.tensor_scale != "tensor"
]


# --- the operations, interpreted or on a GPU -------------------------------------------------


@pytest.fixture
def backend() -> ModuleType:
    from mixbits.backends import triton

    assert triton.why_unavailable() is None
    assert triton.supports(DEVICE)
    return triton


@pytest.fixture
def cell(matrix, backend):
    return cells(matrix, backend, DEVICE)


def test_round_trip(backend, cell):
    """Columns that end within a byte of a plane, a group, a tile; and the first tile of several."""
    for fmt in ALL:
        assert backend.holds(fmt)
        with cell(ROUND_TRIP[: 1 if fmt.tensor_scale == "row" else 3], fmt):
            is_first = fmt in FORMATS
            usual = is_first or fmt in MORE_KINDS
            check_round_trip(backend, DEVICE, fmt, 33, DTYPES if usual else DTYPES[:1])
            for columns in (1, 31, 172, 320) if fmt in MORE_KINDS else (640,):
                dtypes = DTYPES if is_first else MAYBE_ALL_DTYPES
                check_round_trip(backend, DEVICE, fmt, columns, dtypes)


def test_all_codes_and_scales(backend, cell):
    for fmt in WEIGHTS:
        with cell("every code and scale", fmt):
            dtypes = DTYPES if fmt in KINDS else MAYBE_ALL_DTYPES
            check_all_codes_and_scales(backend, DEVICE, fmt, dtypes)


def test_what_no_operation_can_be_given_is_refused(matrix, backend):
    way = "interpreted" if INTERPRETED else "GPU"
    check_refusals(matrix, "triton", way, DEVICE.type)
    check_twins(matrix, "triton", way)


def test_leading_dimensions(backend):
    x = torch.randn(2, 3, 5, 96)
    fmt = MX_FORMATS[0]
    got = backend.fake_quantize(x.to(DEVICE), fmt)
    assert_same_bits(got.cpu(), reference.fake_quantize(x, fmt))


def test_statistics(backend, cell):
    """Of formats beside others; a scale of the whole tensor is not that of a program's tile."""
    check_statistics(backend, DEVICE, 31, SOME_FORMATS)
    check_square_sums(backend, DEVICE, 31, SOME_FORMATS)
    for columns, rows, some in ((172, 41, FORMATS), (140, 17, [*MORE_FORMATS, MX_FORMATS[0]])):
        check_statistics(backend, DEVICE, columns, some, rows)
        check_square_sums(backend, DEVICE, columns, some, rows)
        for fmt in some:
            with cell(("fisher_statistics", "gradient_statistics", "square_sums"), fmt):
                pass


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


def test_matmul(backend, cell):
    for fmt in WEIGHTS:
        with cell("packed_matmul", fmt):
            check_matmul(backend, DEVICE, fmt, (17, 66 if fmt in FORMATS else 20, 172))
            if fmt in MORE_FORMATS:
                check_matmul(backend, DEVICE, fmt, (1, 5, 33))


def test_matmul_with_activations(backend, cell):
    for fmt in ALL:
        if fmt.tensor_scale == "tensor":
            continue
        with cell("activations", fmt):
            for weight in (MX_FORMATS[0], MORE_WEIGHTS[-1], INT_FORMATS[-1])[
                : 3 if fmt in KINDS_OF_ACTIVATIONS else 1
            ]:
                check_matmul(backend, DEVICE, weight, (3, 20, 172), activation=fmt)


@pytest.mark.parametrize(
    "shape", [(1, 5, 1), (3, 64, 31), (118, 65, 256), (1, 70, 1056), (257, 40, 96)], ids=str
)
@pytest.mark.parametrize("fmt", [MX_FORMATS[0], INT_FORMATS[-1]], ids=format_id)
def test_matmul_shapes(backend, fmt, shape):
    check_matmul(backend, DEVICE, fmt, shape)


@pytest.mark.parametrize("segments", MIXES)
def test_mixed_matmul(backend, segments):
    shapes = ((17, 100), torch.float16), ((1, 15), torch.float32), ((3, 17), torch.bfloat16)
    for (shape, dtype), arranged in zip(shapes, ARRANGED, strict=True):
        check_mixed(backend, DEVICE, segments, shape, arranged, [dtype])


def test_mixed_matmul_of_long_rows(backend, monkeypatch):
    """Columns that are split among programs; and the weight of many tokens, in blocks of rows."""
    segments = (("MXFP8", 160), ("MXFP4", 864))
    check_mixed(backend, DEVICE, segments, (1, 1), "rotated", [torch.bfloat16])
    check_mixed(backend, DEVICE, "integers", (118, 33), "ordered", [torch.bfloat16])
    monkeypatch.setattr(backend, "MAX_FUSED_TOKENS", 16)
    monkeypatch.setattr(scratch, "SCRATCH_BYTES", 8 * 320 * 4)
    check_mixed(backend, DEVICE, "both", (17, 33), "ordered")
    check_mixed(backend, DEVICE, "172", (118, 17), "rotated")


def test_mixed_matmul_of_more_formats(backend):
    """Among them activations whose rows have one scale, of a segment's columns."""
    segments = (("NVFP4", 64), ("FP8", 96), ("W5A16G32ASYM", 32), ("MXFP6xMXINT8", 44))
    shapes = ((3, 17), torch.float16), ((1, 15), torch.float32), ((17, 5), torch.bfloat16)
    for (shape, dtype), arranged in zip(shapes, ARRANGED, strict=True):
        check_mixed(backend, DEVICE, segments, shape, arranged, [dtype])


def test_arrange(backend):
    check_arrange(backend._kernels("arrange").arrange, DEVICE)


def test_empty(backend):
    check_empty(backend, DEVICE, INT_FORMATS[1])
