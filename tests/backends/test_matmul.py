"""Products with packed weights on CPU tensors, with every instruction set that this CPU has."""

import itertools
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from conftest import CPU_PACKED, DTYPES, FORMATS, MX_FORMATS, by_dtype, by_isa, format_id
from mixes import meets_integers

from mixbits import ops
from mixbits.formats import reference
from mixbits.formats.pack import SCALE_DTYPES, Operand, Packed, pack, unpack
from mixbits.formats.schemes import SCALE_MODES, Format, parse_scheme, per_row

MXFP4 = Format("e2m1", 32)
MXFP8 = Format("e4m3", 32)
INT4 = Format("int4", 128)
MXINT8 = Format("int8", 32, scale="e8m0")
MXFP6, NVFP4 = Format("e2m3", 32), Format("e2m1", 16, scale="e4m3")
INTEGERS = [Format(f"int{bits}", 32) for bits in (2, 3, 4, 5, 6, 8)]
CODES = [MXFP4, MXFP6, NVFP4, MXINT8, *INTEGERS]  # one of each kind that is small integers


def integer_bound(x, values):
    """How far rounding x [M, K] to integers, where weights are integers, can move each output.

    In a block of 32 the step is 2^-14 (float32: 2^-22) of the power of two below the largest
    value, or twice that just below the next power; rounding moves a value by half of it
    (csrc/cpu/matmul/activations.h).
    """
    blocks = torch.nn.functional.pad(x.double().abs(), (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    half = 2.0**-23 if x.dtype == torch.float32 else 2.0**-15
    half_step = 1.01 * half * blocks.amax(-1).repeat_interleave(32, -1)[:, : x.shape[1]]
    return half_step @ values.double().abs().T


class Product(NamedTuple):
    """x [M, K] times packed weights, in float64, and by how much a kernel may be off, [M, N]."""

    x: torch.Tensor
    packed: Packed
    fmt: Format
    activation: Format | None
    exact: torch.Tensor
    torchs_error: torch.Tensor
    allowed: torch.Tensor


def packed_and_values(weight, fmt):
    packed = ops.quantize_pack(weight, fmt, "reference")
    return packed, ops.dequantize(packed, fmt, weight.shape[1], torch.float32, "reference")


@lru_cache(maxsize=64)  # for all numbers of tokens, dtypes, activations
def random_weight(rows, columns, fmt):
    generator = torch.Generator().manual_seed(rows + columns)
    return packed_and_values(torch.randn(rows, columns, generator=generator), fmt)


def product(x, weight, fmt, activation):
    """At most twice the error of torch's matmul in x's dtype is allowed.

    `weight` is packed, and its values.
    """
    packed, values = weight
    rounded = x if activation is None else reference.fake_quantize(x, activation)
    exact = rounded.double() @ values.double().T
    # Weights as torch would have them: where x's dtype cannot hold them, that rounding is torch's
    # error and not ours. The product of float32 copies, rounded, is the better of torch's two.
    torchs_error = ((rounded.float() @ values.T).to(x.dtype).double() - exact).abs()
    # Torch may be exact by luck in a small case. Any sum rounded to the dtype is off by up to half
    # a unit in the last place (eps / 2), and float32 sums of K terms by about sqrt(K) roundings
    # of the largest partial sum, which the sum of magnitudes bounds.
    magnitudes = rounded.double().abs() @ values.double().abs().T
    floor = torch.finfo(x.dtype).eps * exact.abs() + 2.0**-23 * magnitudes
    if activation is None and meets_integers(fmt):
        floor += integer_bound(x, values)
    return Product(x, packed, fmt, activation, exact, torchs_error, 2 * torchs_error + floor)


@lru_cache(maxsize=256)  # as many as one test has, for its turn with every instruction set
def random_product(tokens, rows, columns, dtype, fmt, activation):
    generator = torch.Generator().manual_seed(tokens + rows + columns)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    return product(x, random_weight(rows, columns, fmt), fmt, activation)


def check_matmul(case, backend):
    got = ops.packed_matmul(case.x, case.packed, case.fmt, case.activation, backend)
    assert got.dtype == case.x.dtype and got.shape == case.exact.shape
    error = (got.double() - case.exact).abs()
    assert (error <= case.allowed).all(), (error / case.allowed).max().item()
    if error.numel() > 100:
        assert error.norm() <= 2 * case.torchs_error.norm() + 2.0**-24 * case.exact.norm()


# Those of which there is one way to multiply take few shapes.
MORE = [fmt for fmt in CPU_PACKED if fmt not in FORMATS]


@by_isa
@pytest.mark.parametrize("fmt", CPU_PACKED, ids=format_id)
def test_matmul(matrix, isa, fmt):
    with matrix.cell("cpu", isa, "packed_matmul", fmt):
        for tokens, (number, columns) in itertools.product(
            (1, 2, 3, 4, 17, 118), enumerate([1, 31, 32, 96, 172, 192])
        ):
            for rows in (1, 17) if fmt in MORE else (1, 15, 16, 17, 100):
                dtype = DTYPES[(number + rows) % 3]
                activation = per_row(fmt) if fmt.scale != "float16" and rows % 2 else None
                check_matmul(random_product(tokens, rows, columns, dtype, fmt, activation), "cpu")


@by_isa
@pytest.mark.parametrize(
    "scheme",
    [
        *("MXFP4", "MXFP4A16", "MXFP8", "MXFP8A16", "W4A16", "W8A16", "W2A16G32ASYM", "MXFP6"),
        *("NVFP4A16", "NVFP4", "FP8", "W4xFP8", "W4xINT8", "MXFP4xFP8", "NVFP4xMXFP8"),
        *("MXFP4xMXINT8", "W4xMXINT8", "W2G32ASYMxMXINT8", "W8G32xMXINT8"),
    ],
)
@by_dtype
def test_matmul_of_many_columns(isa, scheme, dtype):
    scheme = parse_scheme(scheme)
    for tokens in (1, 5, 17, 512):
        formats = scheme.weight, scheme.activation
        check_matmul(random_product(tokens, 100, 4096, dtype, *formats), "cpu")


@by_isa
@pytest.mark.parametrize(
    "scheme",
    [
        *("MXFP6A16", "W6A16G32", "W5A16ASYM", "W3A16G64", "NVFP4xMXINT8", "MXFP6xMXINT8"),
        *("W6G32xMXINT8", "W5xMXFP4", "W3G32ASYMxMXINT8", "MXINT8", "W8ASYMxMXINT8"),
    ],
)
def test_few_tokens_of_many_columns(isa, scheme):
    scheme = parse_scheme(scheme)
    for tokens, dtype in zip((1, 2, 4), DTYPES, strict=True):
        formats = scheme.weight, scheme.activation
        check_matmul(random_product(tokens, 40, 4096 + 45, dtype, *formats), "cpu")


MIXED = [
    *("MXFP4", "MXFP4xMXINT8", "W4xMXINT8", "MXINT8", "MXFP8", "W4A16", "MXFP4A16"),
    *("W8A16G32ASYM", "W2A16", "MXFP8E5M2", "W4A16G32"),
]


def operands_of(names, columns):
    for number, name in enumerate(names):
        scheme = parse_scheme(name)
        packed = ops.quantize_pack(torch.randn(17 + number, columns), scheme.weight)
        yield Operand.plain(packed, scheme.weight, columns, scheme.activation)


@by_dtype
@pytest.mark.parametrize("tokens", [0, 1, 3, 40, 300])
def test_several_weights_in_one_call(isa, tokens, dtype):
    x = torch.randn(tokens, 192).to(dtype)
    operands = list(operands_of([*MIXED, *MIXED[:3]], 192))
    together = ops.packed_matmuls(x, operands, "cpu")
    for operand, got in zip(operands, together, strict=True):
        assert torch.equal(got, ops.packed_matmul(x, *operand.parts[0], "cpu"))
    # Both sides round results to the dtype, by up to 2^-9 in bfloat16, and so may activations.
    for got, want in zip(ops.packed_matmuls(x[:3], operands, "reference"), together, strict=True):
        torch.testing.assert_close(got, want[:3], rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "scheme",
    [
        *("MXFP4A16", "W4A16", "W8A16", "W4A16ASYM", "NVFP4A16", "MXFP6A16", "W6A16G32"),
        *("W5A16", "W3A16G32ASYM"),
    ],
)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_int8_activations_err_by_their_rounding(isa, scheme, tokens):
    fmt, columns = parse_scheme(scheme).weight, 512
    x, packed = torch.randn(tokens, columns), ops.quantize_pack(torch.randn(50, columns), fmt)
    values = ops.dequantize(packed, fmt, columns, backend="cpu")
    exact = x.double() @ values.double().T
    got = ops.packed_matmul(x, packed, fmt, backend="cpu", int8_activations=True).double()
    error = (got - exact).norm() / exact.norm()
    # A step is 1/127 of a block's largest value, about 2.3 standard deviations here; rounding is
    # off by a step over sqrt(12).
    assert error < 1.2 * 2.3 / 127 / 12**0.5
    blocks = x.unflatten(1, (-1, 32))
    steps = blocks.abs().amax(-1, keepdim=True) / 127
    bound = (0.505 * steps.expand_as(blocks).flatten(1)).double() @ values.double().abs().T
    assert ((got - exact).abs() <= bound).all()


def packed_codes(codes, fmt, zero_point=None):
    """A weight of these codes [N, K], all of whose scales are 1."""
    one = {"float16": 1.0, "e8m0": 127, "e4m3": 0x38}[fmt.scale]
    scale = torch.full((len(codes), fmt.groups(codes.shape[1])), one).to(SCALE_DTYPES[fmt.scale])
    divisor = torch.ones(1) if fmt.tensor_scale else None
    return pack(reference.Quantized(codes, scale, zero_point, divisor), fmt)


@pytest.mark.parametrize("fmt", CODES, ids=format_id)
def test_every_code_in_every_place(isa, fmt):
    """Tokens that see one column each, by every number of tokens that a path takes at once."""
    rows, columns = 1 << fmt.bits, 300
    codes = (torch.arange(rows)[:, None] + 7 * torch.arange(columns)) % rows
    packed = packed_codes(codes.to(torch.uint8), fmt)
    values = reference.dequantize(unpack(packed, fmt, columns), fmt)
    for dtype, first in ((torch.float32, 0), (torch.bfloat16, 1)):
        x, tokens = torch.eye(columns).to(dtype), 1 + first
        while first < columns:
            got = ops.packed_matmul(x[first : first + tokens].clone(), packed, fmt, None, "cpu")
            assert torch.equal(got.float(), values.T[first : first + tokens]), (first, tokens)
            first, tokens = first + tokens, tokens % 5 + 1


ASYMMETRIC = [replace(fmt, symmetric=False) for fmt in INTEGERS]


@pytest.mark.parametrize("fmt", [*CODES, *ASYMMETRIC], ids=format_id)
@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_the_largest_sums_of_integers_fit(isa, fmt, tokens):
    """Only the largest and the smallest codes, and activations whose bytes are as large as any."""
    columns = 416
    top = torch.tensor([(1 << fmt.bits) - 1, 0])  # of integers; of floats the largest, and 0
    if fmt.is_float:
        top = torch.tensor([(1 << (fmt.bits - 1)) - 1, (1 << fmt.bits) - 1])
    codes = top[torch.tensor([0, 0, 0, 1, 1, 1])][:, None].repeat(1, columns)
    codes[2::3] = top[torch.randint(2, (2, columns))]
    codes = codes.to(torch.uint8)
    zero = None if fmt.symmetric else codes[:, ::32].flip(0).contiguous()
    packed = packed_codes(codes, fmt, zero)
    values = reference.dequantize(unpack(packed, fmt, columns), fmt).double()
    # 24 bits: bytes of 127 or -128 only. 16 bits, and 8: likewise, and the ends of MXINT8's range.
    bytes3 = torch.randint(2, (tokens, columns, 3)) * -255 + 127
    wide = (bytes3 * torch.tensor([1 << 16, 1 << 8, 1])).sum(-1).clamp(-8355711, 8355711)
    bytes2 = (bytes3[..., :2] * torch.tensor([1 << 8, 1])).sum(-1).clamp(-32639, 32639)
    mxint8 = torch.where(bytes3[..., 0] > 0, 1.984375, -1.9999)
    for x, activation in (
        (wide.float(), None),
        (bytes2.half() / 65536, None),
        (bytes2.bfloat16(), None),
        (-bytes2.abs().float(), None),
        (mxint8, MXINT8),
        (-mxint8.abs(), MXINT8),
        (bytes3[..., 0].sign().float() * 6, MXFP4),
    ):
        rounded = x if activation is None else reference.fake_quantize(x, activation)
        exact = rounded.double() @ values.T
        got = ops.packed_matmul(x, packed, fmt, activation, "cpu")
        # Of integers nothing is lost but by sums of their products in float32: up to 104 of these,
        # each rounded by 2^-24 of what is there already. A sum that did not fit would lose half.
        allowed = 2.0**-17 * (rounded.double().abs() @ values.abs().T)
        allowed += torch.finfo(x.dtype).eps * exact.abs()
        assert ((got.double() - exact).abs() <= allowed).all(), (x.dtype, activation)


@pytest.mark.parametrize("divisor", [1.0, 2688 / 3.0, 1e-25, 1e25, 2.0**-70, 3.0e-39])
@pytest.mark.parametrize("columns", [16, 172, 1040])
def test_every_scale_of_nvfp4(isa, divisor, columns):
    """Bytes with a sign, and that of NaN, which no rounding makes, as the reference reads them."""
    rows, groups = 256, NVFP4.groups(columns)
    codes = torch.randint(1, 16, (rows, columns)).to(torch.uint8)
    scale = (torch.arange(rows)[:, None] + torch.arange(groups) // 8 * 37) % 256
    rest = torch.randint(0, 127, (rows, groups))  # whole vectors of ordinary bytes, too
    scale = torch.where(torch.arange(groups) % 8 == 3, scale, rest).to(torch.uint8)
    q = reference.Quantized(codes, scale, None, torch.tensor([divisor]))
    packed, values = pack(q, NVFP4), reference.dequantize(q, NVFP4).double()
    for tokens in (1, 4, 6):
        x = torch.randn(tokens, columns) * (2.0**-64 if divisor < 1e-20 else 1)
        exact, magnitudes = x.double() @ values.T, x.double().abs() @ values.abs().T
        got = ops.packed_matmul(x, packed, NVFP4, None, "cpu").double()
        assert torch.equal(got.isnan(), exact.isnan())
        error = (got - exact).abs().nan_to_num()
        assert (error <= 1e-6 * magnitudes.nan_to_num()).all()


@pytest.mark.parametrize("fmt", [MXFP4, MXFP8, INT4], ids=format_id)
def test_matmul_does_not_depend_on_threads(isa, fmt):
    packed = ops.quantize_pack(torch.randn(130, 416), fmt)
    before = torch.get_num_threads()
    for tokens in (1, 40):
        x = torch.randn(tokens, 416)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.packed_matmul(x, packed, fmt, backend="cpu"))
        torch.set_num_threads(before)
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    "activation", [None, *MX_FORMATS[:3], MXINT8], ids=lambda f: f and format_id(f)
)
@by_dtype
@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_matmul_of_extreme_scales(isa, activation, dtype, tokens):
    """Weights and tokens near the ends of their ranges, whose products are ordinary numbers."""
    columns = 128
    # The first weights have the scale 2^-127, which is subnormal in float32.
    for power, inverse in (
        (-126, 110),
        (-100, 100),
        (-14, 14),
        (14, -14),
        (100, -100),
        (120, -120),
    ):
        if dtype == torch.float16 and abs(inverse) > 12:
            continue
        x = (torch.randn(tokens, columns) * 2.0**inverse).to(dtype)
        weight = torch.randn(33, columns) * 2.0**power
        check_matmul(product(x, packed_and_values(weight, MXFP4), MXFP4, activation), "cpu")


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("exponent", [-25, -24, -23, -22, -20, 12, 13, 14, 15])
@pytest.mark.parametrize("mode", SCALE_MODES)
@pytest.mark.parametrize("kind", [MXFP4, MXINT8], ids=str)
def test_matmul_of_float16_tokens_that_round_in_float16(isa, tokens, exponent, mode, kind):
    """A block's values may lie among float16's subnormals, or beyond its largest number."""
    x = ((torch.rand(tokens, 128) * 3.8 - 1.9) * 2.0**exponent).half()
    packed = ops.quantize_pack(torch.randn(20, 128) * 2.0**-exponent, MXFP4)
    activation = replace(kind, scale_mode=mode)
    got = ops.packed_matmul(x, packed, MXFP4, activation, "cpu")
    expected = ops.packed_matmul(x, packed, MXFP4, activation, "reference")
    # Both add in float32 before they round; cancellation leaves 2^-24 of the largest terms.
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3, equal_nan=True)


@pytest.mark.parametrize("fmt", [MXFP4, MXFP8, INT4], ids=format_id)
@pytest.mark.parametrize("tokens", [1, 9, 70])
@pytest.mark.parametrize("bad_token", [False, True])
def test_matmul_passes_nan_on(isa, fmt, tokens, bad_token):
    x, weight = torch.randn(tokens, 160), torch.randn(10, 160)
    weight[3, 7] = torch.nan
    expected = torch.zeros(tokens, 10, dtype=torch.bool)
    expected[:, 3] = True
    if bad_token:
        x[0, 150] = torch.inf
        expected[0] = True
    got = ops.packed_matmul(x, ops.quantize_pack(weight, fmt), fmt, MXFP4, "cpu")
    assert torch.equal(got.isnan(), expected)


@pytest.mark.parametrize("element", ["e2m1", "e4m3", "e5m2"])
@pytest.mark.parametrize("columns", [160, 4200])
def test_many_tokens_meet_scales_of_all_sizes(isa, element, columns):
    """Up to the largest span of scales that is multiplied into a panel of bfloat16, and beyond."""
    fmt, x = Format(element, 32), torch.randn(70, columns).bfloat16()
    lowest = {"e2m1": 2, "e4m3": 8, "e5m2": 15}[element] - 26  # of a block with a value above 1/2
    powers = torch.randint(lowest, 50, (40, -(-columns // 32))).double()
    for row, power, inside in ((5, 0, True), (17, -120, False), (33, 70, False)):
        powers[row] = power
        sizes = (2.0**powers).repeat_interleave(32, -1)[:, :columns]
        weight = packed_and_values((torch.randn(40, columns) * sizes).float(), fmt)
        case = product(x, weight, fmt, None)
        scales = case.packed.weight_scale.int() - 127
        assert (scales.min() >= -27 and scales.max() <= 60) == inside
        check_matmul(case, "cpu")


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
@pytest.mark.parametrize("tokens", [2, 70])
def test_matmul_passes_codes_on_that_are_no_numbers(isa, element, tokens):
    fmt = Format(element, 32)
    packed = ops.quantize_pack(torch.randn(40, 96) / 64, fmt)
    codes = packed.weight_packed.clone()
    codes[3, 40], codes[20, 95] = 0x7F, 0xFF
    if element == "e5m2":
        codes[8, 2], codes[9, 2] = 0x7C, 0xFC  # infinities
    x, packed = torch.rand(tokens, 96).bfloat16() + 1, packed._replace(weight_packed=codes)
    got, expected = (ops.packed_matmul(x, packed, fmt, None, name) for name in ("cpu", "reference"))
    # Both round to bfloat16, by up to 2^-9 of a sum; float32 sums of numbers below 1 differ by less
    # than 1e-5.
    torch.testing.assert_close(got, expected, rtol=2**-8, atol=1e-5, equal_nan=True)
    assert got[:, [3, 20]].isnan().all()
