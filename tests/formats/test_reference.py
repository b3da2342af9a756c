"""The reference against definitions it does not share code with: torch's own float8, a search
over all codes, exact fractions, and auto_round."""

import itertools
import math

import pytest
import torch
from conftest import FORMATS, MX_FORMATS, assert_same_bits, format_id, hard_rows

from mixbits.formats import reference
from mixbits.formats.schemes import MINIFLOATS, Format

FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def all_codes(element):
    return torch.arange(1 << MINIFLOATS[element].bits, dtype=torch.int32).to(torch.uint8)


@pytest.mark.parametrize("element", FLOAT8)
def test_decode_equals_torch_float8(element):
    codes = all_codes(element)
    expected = codes.view(FLOAT8[element]).float()
    expected[expected.isinf()] = torch.nan  # e5m2's infinities are never written
    assert_same_bits(reference.minifloat_decode(codes, MINIFLOATS[element]), expected)


def test_decode_e2m1():
    expected = torch.tensor(E2M1 + [-value for value in E2M1])
    assert_same_bits(reference.minifloat_decode(all_codes("e2m1"), MINIFLOATS["e2m1"]), expected)


@pytest.mark.parametrize("element", MINIFLOATS)
def test_encode_inverts_decode(element):
    codes = all_codes(element)
    values = reference.minifloat_decode(codes, MINIFLOATS[element])
    finite = ~values.isnan()
    encoded = reference.minifloat_encode(values[finite], MINIFLOATS[element])
    assert torch.equal(encoded, codes[finite])


@pytest.mark.parametrize("element", FLOAT8)
def test_rounding_equals_torch_float8(element):
    top = MINIFLOATS[element].max_value
    x = torch.cat([torch.randn(20000) * 2.0 ** torch.randint(-20, 18, (20000,)), torch.zeros(1)])
    x = x.clamp(-top, top)
    expected = x.to(FLOAT8[element]).float()
    assert_same_bits(reference.round_minifloat(x, MINIFLOATS[element]), expected)


@pytest.mark.parametrize("element", MINIFLOATS)
def test_rounding_equals_a_search(element):
    """Nearest value over all codes; between two equally near, the one whose code is even."""
    fmt = MINIFLOATS[element]
    values = reference.minifloat_decode(all_codes(element), fmt).double()
    grid = [(v, c) for c, v in enumerate(values.tolist()) if v >= 0 and not math.isnan(v)]
    grid.sort()
    middles = [(a + b) / 2 for (a, _), (b, _) in itertools.pairwise(grid)]
    points = torch.tensor(middles + [v for v, _ in grid], dtype=torch.float32)
    points = torch.cat([points, torch.nextafter(points, torch.tensor(math.inf))])
    points = torch.cat([points, torch.nextafter(points, torch.tensor(-math.inf)).abs()])
    for point in points.tolist():
        best = min(grid, key=lambda vc: (abs(vc[0] - point), vc[1] % 2))[0]
        for sign in (1.0, -1.0):
            rounded = reference.round_minifloat(torch.tensor([sign * point]), fmt).item()
            assert rounded == sign * best, (point, sign)


def test_e8m0():
    values = reference.e8m0_to_float(torch.arange(256, dtype=torch.int32).to(torch.uint8))
    assert values[:255].double().tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert values[255].isnan()


@pytest.mark.parametrize("fmt", MX_FORMATS, ids=format_id)
def test_scale_modes_by_their_definition(fmt):
    """Exponents computed from frexp and comparisons in float64, at and around binades."""
    element = MINIFLOATS[fmt.element]
    ones = torch.tensor(
        [1.0, 1.25, 1.5, 1.75, 1.75 - 2**-23, 1.75 + 2**-23, 1.5 + 2**-23, 2 - 2**-23]
    )
    maxima = (ones[:, None] * torch.exp2(torch.arange(-126.0, 128))).flatten()
    maxima = torch.cat([maxima, torch.tensor([0.0, 2.0**-127, 2.0**-149])])
    bytes_ = reference.mx_scale(maxima, fmt).tolist()
    for m, byte in zip(maxima.double().tolist(), bytes_, strict=True):
        fraction, exponent = math.frexp(m)
        fraction, exponent = 2 * fraction, exponent - 1
        expected = exponent - element.max_exponent
        if fmt.scale_mode == "rceil" and m > 0:
            expected += m > element.max_value * 2.0**expected
        if fmt.scale_mode == "even":
            expected += fraction >= 1.75
        assert byte == (0 if m == 0 else max(expected, -127) + 127), m


@pytest.mark.parametrize("fmt", FORMATS, ids=format_id)
def test_non_finite_groups_are_nan_as_a_whole(fmt):
    group = fmt.group_size
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.ones(1, 2 * group + 1)
        x[0, group + 1] = bad
        nan = reference.fake_quantize(x, fmt).isnan()[0]
        assert nan[group : 2 * group].all()
        assert not nan[:group].any() and not nan[2 * group :].any()


@pytest.mark.parametrize("fmt", FORMATS, ids=format_id)
@pytest.mark.parametrize("columns", [1, 31, 33, 172, 192])
def test_groups_are_independent(fmt, columns):
    """Every group of a row rounds as it would alone, the short last one too."""
    x = hard_rows(columns, torch.float32)
    whole = reference.fake_quantize(x, fmt)
    for first in range(0, columns, fmt.group_size):
        part = x[:, first : first + fmt.group_size]
        assert_same_bits(
            whole[:, first : first + fmt.group_size], reference.fake_quantize(part, fmt)
        )


@pytest.mark.parametrize("fmt", MX_FORMATS, ids=format_id)
def test_mx_is_idempotent(fmt):
    if fmt.scale_mode != "even":
        # A block of saturated values may gain a binade under "even": 1.75 * 2^e rounds up again.
        x = torch.randn(64, 96)
        once = reference.fake_quantize(x, fmt)
        assert torch.equal(reference.fake_quantize(once, fmt), once)


def test_rceil_never_clamps():
    x = torch.randn(256, 32) * torch.exp2(torch.randint(-30, 30, (256, 1)).float())
    for element, fmt in MINIFLOATS.items():
        q = reference.quantize(x, Format(element, 32, scale_mode="rceil"))
        top = x.abs().amax(-1) / reference.e8m0_to_float(q.scale)[:, 0]
        assert (top <= fmt.max_value).all()


def test_integer_error_is_at_most_half_a_step():
    x = torch.randn(64, 256)
    for name, group in itertools.product(("int2", "int4", "int8"), (32, 64, 128)):
        fmt = Format(name, group, symmetric=False)
        q = reference.quantize(x, fmt)
        error = (reference.dequantize(q, fmt) - x).abs().unflatten(1, (-1, group))
        step = q.scale.float()[..., None]
        # Rounding of the scale to float16 moves the ends of the range by up to 2^-11 of it.
        slack = 0.5 + (2**fmt.bits - 1) * 2.0**-11
        assert (error <= slack * step).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_equal_auto_round(bits):
    data_type = pytest.importorskip("auto_round.data_type.int")
    x = torch.randn(32, 256) * torch.exp2(torch.randint(-3, 4, (32, 1)).float())
    expected, _, _ = data_type.quant_tensor_sym(x, bits=bits, group_size=128)
    fmt = Format(f"int{bits}", 128)
    assert torch.equal(reference.fake_quantize(x, fmt), expected.float())
    expected, _, _ = data_type.quant_tensor_asym(x, bits=bits, group_size=128)
    fmt = Format(f"int{bits}", 128, symmetric=False)
    assert torch.equal(reference.fake_quantize(x, fmt), expected.float())


@pytest.mark.parametrize("element", MINIFLOATS)
def test_mx_floor_equals_auto_round(element):
    data_type = pytest.importorskip("auto_round.data_type.mxfp")
    name = {"e2m1": "mx_fp4", "e2m3": "mx_fp6e2m3", "e4m3": "mx_fp8e4m3", "e5m2": "mx_fp8e5m2"}[
        element
    ]
    # bfloat16 values: auto_round takes a float log2, which errs just below powers of two.
    x = torch.randn(32, 256).bfloat16().float()
    expected = data_type.quant_mx(x, bits=MINIFLOATS[element].bits, group_size=32, data_type=name)[
        0
    ]
    assert torch.equal(reference.fake_quantize(x, Format(element, 32)), expected.float())
