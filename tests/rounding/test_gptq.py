"""Better rounding against slow twins: all scales tried, and columns eliminated one by one."""

import math

import pytest
import torch
from conftest import FORMATS, MX_FORMATS, format_id

from mixbits import ops
from mixbits.formats.compensate import search
from mixbits.formats.reference import Quantized, Scales, dequantize, encode, fake_quantize, scales
from mixbits.formats.schemes import Format
from mixbits.rounding.gptq import DAMPING, Curvature, corrected, gptq

MXFP4, MXFP8 = Format("e2m1", 32), Format("e4m3", 32)
INT4 = Format("int4", 32)
MXINT8 = Format("int8", 32, scale="e8m0", scale_mode="rceil")


def inputs(tokens: int, columns: int) -> torch.Tensor:
    """Correlated inputs with a few large columns, as in language models."""
    mixing = torch.randn(columns, columns) / columns**0.5 + torch.eye(columns)
    return torch.randn(tokens, columns) @ mixing * torch.rand(columns).add(0.1).square()


def group_errors(x, values, fmt, weight):
    error = (x - values).square() * weight
    pad = -x.shape[1] % fmt.group_size
    return torch.nn.functional.pad(error, (0, pad)).unflatten(1, (-1, fmt.group_size)).sum(-1)


@pytest.mark.parametrize("fmt", FORMATS, ids=format_id)
@pytest.mark.parametrize("weighted", [False, True])
def test_searched_scales_are_never_worse(fmt, weighted):
    x = torch.randn(40, 172) * torch.rand(40, 1).exp2()
    weight = torch.rand(172) if weighted else None
    found = dequantize(search(x, fmt, weight), fmt)
    counts = torch.ones(172) if weight is None else weight
    errors = [group_errors(x, v, fmt, counts) for v in (found, fake_quantize(x, fmt))]
    assert (errors[0] <= errors[1]).all()
    # With 8 bits only the floor, which cuts off what is above the largest value, can be bettered.
    if fmt.bits < 8 or (fmt.is_float and fmt.scale_mode == "floor"):
        assert errors[0].sum() < errors[1].sum()


@pytest.mark.parametrize("fmt", MX_FORMATS, ids=format_id)
def test_an_mx_search_finds_the_best_of_all_powers_of_two(fmt):
    x = torch.randn(200, 32) * torch.rand(200, 1).mul(8).exp2()
    best = torch.full((200, 1), torch.inf)
    usual = scales(x, Format(fmt.element, 32)).scale
    for step in range(-3, 5):
        scale = (usual.int() + step).to(torch.uint8)
        values = dequantize(Quantized(encode(x, Scales(scale), fmt), scale), fmt)
        best = torch.minimum(best, group_errors(x, values, fmt, torch.ones(32)))
    values = dequantize(search(x, fmt), fmt)
    torch.testing.assert_close(group_errors(x, values, fmt, torch.ones(32)), best)


@pytest.mark.parametrize("fmt", FORMATS, ids=format_id)
def test_a_group_of_zeros_and_one_that_is_not_finite(fmt):
    x = torch.zeros(2, fmt.group_size)
    x[1, 3] = torch.inf
    found = search(x, fmt)
    assert torch.equal(dequantize(found, fmt)[0], x[0])
    assert dequantize(found, fmt)[1].isnan().all()


def eliminated(weight, moments, parts):
    """GPTQ by its definition, in float64: the inverse loses a row and a column at each step."""
    left = weight.double().clone()
    h = moments.double() + DAMPING * moments.double().diagonal().mean() * torch.eye(len(moments))
    inverse = torch.linalg.inv(h)
    values = torch.zeros_like(left)
    start = 0
    for fmt, columns in parts:
        for j in range(start, start + columns):
            group = (j - start) % fmt.group_size
            if group == 0:
                stop = min(j + fmt.group_size, start + columns)
                block = left[:, j:stop].float()
                q = search(block, fmt, h.diagonal()[j:stop].float())
            column = left[:, j : j + 1].float()
            code = encode(column, q.scales, fmt)
            values[:, j : j + 1] = dequantize(Quantized(code, *q.scales), fmt).double()
            error = (left[:, j] - values[:, j]) / inverse[j, j]
            left[:, j:] -= error[:, None] * inverse[j, j:]
            inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
        start += columns
    return values


@pytest.mark.parametrize(
    "parts",
    [
        [(MXFP4, 76)],
        [(MXFP8, 32), (MXFP4, 44)],
        [(INT4, 76)],
        [(Format("int2", 32, symmetric=False), 64), (Format("int8", 64), 12)],
    ],
    ids=str,
)
def test_gptq_is_the_elimination_of_columns(parts):
    x = inputs(300, 76)
    moments = x.T @ x / 300
    weight = torch.randn(24, 76)
    found = gptq(weight, Curvature(moments), parts)
    values = torch.cat([dequantize(q, f) for q, (f, _) in zip(found, parts, strict=True)], 1)
    expected = eliminated(weight, moments, parts)
    # A value half way between two codes may fall to either side of it in another precision.
    same = (values.double() - expected).abs() < 1e-5
    assert same.all(1).float().mean() > 0.8
    errors = [
        ((v.double() - weight) @ x.double().T).square().mean().item() for v in (values, expected)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("fmt", [MXFP4, MXFP8, INT4, Format("int2", 64)], ids=format_id)
def test_gptq_lowers_the_error_of_outputs(fmt):
    x = inputs(512, 128)
    weight = torch.randn(64, 128)
    values = dequantize(gptq(weight, Curvature(x.T @ x / 512), [(fmt, 128)])[0], fmt)
    fresh = inputs(512, 128)[:, :128] @ torch.eye(128) + x  # not only on the very inputs
    for tokens in (x, x + 0.05 * fresh):
        before, after = (
            ((v - weight) @ tokens.T).square().mean() for v in (fake_quantize(weight, fmt), values)
        )
        assert after < 0.75 * before


NATIVE_PARTS = {
    "MXFP4": [(MXFP4, 172)],
    "MXFP8, MXFP4": [(MXFP8, 64), (MXFP4, 108)],
    "MXFP8E5M2": [(Format("e5m2", 32, scale_mode="rceil"), 172)],
    "W4A16": [(INT4, 172)],
    "W2A16G32ASYM, W8A16G64": [
        (Format("int2", 32, symmetric=False), 96),
        (Format("int8", 64), 76),
    ],
    "W4A16G32ASYM": [(Format("int4", 32, symmetric=False), 172)],
    "MXFP6, W3A16G32ASYM": [
        (Format("e2m3", 32, scale_mode="even"), 64),
        (Format("int3", 32, symmetric=False), 108),
    ],
    "MXINT8": [(MXINT8, 172)],
    "W5A16, W6A16G64ASYM": [
        (Format("int5", 128), 128),
        (Format("int6", 64, symmetric=False), 44),
    ],
}


@pytest.mark.parametrize("rows", [1, 17, 200])
@pytest.mark.parametrize("name", NATIVE_PARTS)
def test_native_gptq_equals_its_slow_twin_to_the_bit(isa, name, rows):
    x = inputs(300, 172)
    curvature = Curvature(x.T @ x / 300)
    weight = torch.randn(rows, 172) * 2.0 ** torch.randint(-30, 3, (rows, 1))
    weight[0, :40] = 0
    weight[-1, 50:60] = 1e-42  # subnormal
    parts = NATIVE_PARTS[name]
    expected = gptq(weight, curvature, parts)
    found = gptq(weight, curvature, parts, ops.compensate_group)
    for got, want in zip(found, expected, strict=True):
        for a, b in zip(got, want, strict=True):
            assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("fmt", [MXFP4, INT4, Format("e2m3", 32), MXINT8], ids=format_id)
def test_native_gptq_of_what_is_not_finite(isa, fmt):
    weight = torch.randn(20, 64)
    weight[3, 7], weight[9, 60] = torch.nan, torch.inf
    weight[12] = 1e30  # beyond integers' scales
    x = inputs(100, 64)
    curvature = Curvature(x.T @ x / 100)
    twin = dequantize(gptq(weight, curvature, [(fmt, 64)])[0], fmt)
    found = dequantize(gptq(weight, curvature, [(fmt, 64)], ops.compensate_group)[0], fmt)
    assert torch.equal(found.isnan(), twin.isnan()) and found.isnan()[[3, 9]].any(1).all()
    torch.testing.assert_close(found, twin, rtol=0, atol=0, equal_nan=True)


def test_native_gptq_does_not_depend_on_threads(isa):
    x = inputs(300, 96)
    curvature, weight = Curvature(x.T @ x / 300), torch.randn(200, 96)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        group = ops.compensate_group(
            weight[:, 32:64], curvature.upper[32:64, 32:64], curvature.importance[32:64], MXFP4
        )
        results.append(group)
    torch.set_num_threads(before)
    assert torch.equal(results[0].codes, results[1].codes)
    assert torch.equal(results[0].errors, results[1].errors)


def test_gptq_with_inputs_that_are_always_zero():
    x = inputs(100, 64)
    x[:, 5:40] = 0
    weight = torch.randn(8, 64)
    for moments in (x.T @ x / 100, torch.zeros(64, 64)):
        q = gptq(weight, Curvature(moments), [(MXFP4, 64)])[0]
        assert torch.isfinite(dequantize(q, MXFP4)).all()
    # Without inputs nothing is to be made up for: the search alone is left.
    assert torch.equal(dequantize(q, MXFP4), dequantize(search(weight, MXFP4), MXFP4))


def test_of_few_tokens_less_is_made_up_for():
    """What few tokens seem to have in common others have not: damped as if they were many, gptq is
    worse on other tokens than a search alone."""
    moments = inputs(100, 64).double().T.cov()
    shares = [
        float(((Curvature(moments, tokens).damped - moments) / moments.diagonal().mean())[3, 3])
        for tokens in (64, 256, 64 * 200)
    ]
    assert shares == pytest.approx([1.0, 0.25, DAMPING])

    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(128, 128, generator=generator) / 128**0.5 + torch.eye(128)
    few, others = (torch.randn(n, 128, generator=generator) @ mixing for n in (128, 8192))
    weight = torch.randn(64, 128, generator=generator)
    moments = few.T @ few / len(few)

    def lost(tokens: float) -> float:
        q = gptq(weight, Curvature(moments, tokens), [(INT4, 128)])[0]
        return float(((weight - dequantize(q, INT4)) @ others.T).square().mean())

    plain = ((weight - dequantize(search(weight, INT4), INT4)) @ others.T).square().mean()
    assert lost(len(few)) < 0.9 * float(plain) < 0.9 * lost(math.inf)


def test_the_correction_makes_up_for_changed_inputs():
    x = inputs(2000, 48).double()
    xq = x + 0.3 * torch.randn(2000, 48)
    weight = torch.randn(16, 48)
    moments, cross = xq.T @ xq / 2000, x.T @ xq / 2000
    curvature = Curvature(moments)
    assert corrected(weight, curvature, cross, 0.0) is weight
    full = corrected(weight, curvature, cross, 1.0)
    # Least squares for the original outputs, with the damping as a pull towards the weight.
    damping = DAMPING * moments.diagonal().mean() * 2000
    rows = torch.cat([xq, damping.sqrt() * torch.eye(48)])
    targets = torch.cat([x @ weight.double().T, damping.sqrt() * weight.double().T])
    expected = torch.linalg.lstsq(rows, targets).solution.T.float()
    torch.testing.assert_close(full, expected, rtol=1e-4, atol=1e-5)
    half = corrected(weight, curvature, cross, 0.5)
    torch.testing.assert_close(half, (weight + full) / 2, rtol=1e-4, atol=1e-6)
