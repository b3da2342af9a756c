"""Formats beyond MX floats and integers of 2, 4 and 8 bits, against others' definitions.

compressed-tensors dequantizes and packs NVFP4, MXFP6, FP8 and integers; torch has float8.
"""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.mxfp6.helpers import pack_fp6_to_uint8
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam
from conftest import (
    CPU_FORMATS,
    CPU_PACKED,
    FORMATS,
    MORE_FORMATS,
    assert_same_bits,
    by_isa,
    format_id,
)
from matrix import Matrix
from refusals import calls, check_refusals, refuses
from tiny import make_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import mixbits
from mixbits import ops
from mixbits.backends import cpu
from mixbits.backends import reference as reference_backend
from mixbits.errors import UsageError
from mixbits.formats import compensate, reference, schemes
from mixbits.formats.compensate import Group
from mixbits.formats.pack import Packed, pack, packed_spec, unpack
from mixbits.formats.schemes import PLANES, Format
from mixbits.rounding.gptq import Curvature, gptq
from mixbits.runtime.fake import fake_quantize_model
from mixbits.runtime.linear import PackedLinear

# Those that weights are packed in; activations share no scale of a tensor.
PACKED = [fmt for fmt in MORE_FORMATS if fmt.tensor_scale != "row"]
NVFP4 = Format("e2m1", 16, scale="e4m3")
MXFP6 = Format("e2m3", 32)
MXINT8 = Format("int8", 32, scale="e8m0")
FP8 = Format("e4m3", 0, scale="float32")
INT8 = Format("int8", 0, scale="float32")
KINDS = {
    "NVFP4": (
        NVFP4,
        QuantizationArgs(
            num_bits=4,
            type="float",
            strategy="tensor_group",
            group_size=16,
            scale_dtype=torch.float8_e4m3fn,
            zp_dtype=torch.float8_e4m3fn,
        ),
    ),
    "MXFP6": (
        MXFP6,
        QuantizationArgs(
            num_bits=6,
            type="float",
            strategy="group",
            group_size=32,
            scale_dtype=torch.uint8,
            zp_dtype=torch.uint8,
        ),
    ),
    "FP8": (FP8, QuantizationArgs(num_bits=8, type="float", strategy="channel")),
    "W5": (
        Format("int5", 32),
        QuantizationArgs(num_bits=5, type="int", strategy="group", group_size=32),
    ),
    "W3": (
        Format("int3", 128),
        QuantizationArgs(num_bits=3, type="int", strategy="group", group_size=128),
    ),
}


def weights(rows: int = 24, columns: int = 256) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, columns) * torch.rand(rows, 1).mul(8).exp2()


def theirs(q: reference.Quantized, fmt: Format) -> dict[str, Tensor]:
    """Codes' values and scales as compressed-tensors takes them."""
    if fmt.is_float:
        table = reference.minifloat_decode(
            torch.arange(1 << fmt.bits).to(torch.uint8), reference.MINIFLOATS[fmt.element]
        )
        values = table[q.codes.int()]
    else:
        values = q.codes.float() - (1 << (fmt.bits - 1))
    scale = q.scale.view(torch.float8_e4m3fn) if fmt.scale == "e4m3" else q.scale
    scale = reference.e8m0_to_float(scale) if fmt.scale == "e8m0" else scale.float()
    return {"x": values, "scale": scale, "global_scale": q.tensor_scale}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("search", [False, True])
def test_values_equal_those_of_compressed_tensors(name: str, search: bool) -> None:
    fmt, args = KINDS[name]
    weight = weights()
    q = compensate.search(weight, fmt) if search else reference.quantize(weight, fmt)
    given = theirs(q, fmt)
    found = dequantize(x_q=given.pop("x"), args=args, dtype=torch.float32, **given)
    assert_same_bits(reference.dequantize(q, fmt), found)


@pytest.mark.parametrize("name", KINDS)
def test_codes_equal_those_of_compressed_tensors(name: str) -> None:
    fmt, args = KINDS[name]
    weight = weights()
    q = reference.quantize(weight, fmt)
    given = theirs(q, fmt)
    expected = given.pop("x")
    found = quantize(x=weight, zero_point=None, args=args, dtype=torch.float32, **given)
    assert torch.equal(found, expected)


def test_nvfp4_scales_and_bytes_are_those_of_compressed_tensors() -> None:
    fmt, args = KINDS["NVFP4"]
    weight = weights()
    q = reference.quantize(weight, fmt)
    divisor = generate_gparam(weight.amin(), weight.amax())
    assert_same_bits(q.tensor_scale, divisor.reshape(1))
    blocks = weight.unflatten(1, (-1, 16))
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, divisor)
    assert_same_bits(q.scale, scale.to(torch.float8_e4m3fn).view(torch.uint8))
    packed = pack(q, fmt)
    values = theirs(q, fmt)["x"]
    assert torch.equal(packed.weight_packed, pack_fp4_to_uint8(values))
    assert torch.equal(unpack_fp4_from_uint8(packed.weight_packed, *weight.shape).float(), values)


def test_mxfp6_codes_are_those_of_compressed_tensors() -> None:
    """Their bytes hold four codes one behind the other, ours two planes: the codes are alike."""
    q = reference.quantize(weights(), MXFP6)
    words = pack_fp6_to_uint8(theirs(q, MXFP6)["x"]).unflatten(1, (-1, 3)).int()
    word = words[..., 0] | words[..., 1] << 8 | words[..., 2] << 16
    codes = torch.stack([word >> shift & 63 for shift in (0, 6, 12, 18)], -1).flatten(1)
    assert torch.equal(codes, q.codes.int())


def test_fp8_equals_torch() -> None:
    weight = weights()
    q = reference.quantize(weight, FP8)
    scale = weight.abs().amax(1, keepdim=True) / torch.full((24, 1), 448.0)
    assert_same_bits(q.scale, scale)
    expected = (weight / scale).to(torch.float8_e4m3fn)
    assert torch.equal(q.codes, expected.view(torch.uint8))
    assert_same_bits(reference.dequantize(q, FP8), expected.float() * scale)


def test_int8_of_a_row() -> None:
    weight = weights()
    q = reference.quantize(weight, INT8)
    scale = weight.abs().amax(1, keepdim=True) / torch.full((24, 1), 127.5)
    expected = (weight / scale).round().clamp(-128, 127)
    assert torch.equal(q.codes.int() - 128, expected.int())
    assert torch.equal(reference.dequantize(q, INT8), expected * scale)


def test_mxint8_by_the_definition_of_ocp() -> None:
    """Codes count 2^-6 of a power of two; `floor` is that of the maximum."""
    weight = weights()
    q = reference.quantize(weight, MXINT8)
    blocks = weight.double().unflatten(1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True).log2().floor().exp2()
    expected = (blocks / scale * 64).round().clamp(-128, 127)
    assert torch.equal(q.codes.int() - 128, expected.flatten(1).int())
    values = (expected / 64 * scale).flatten(1)
    assert torch.equal(reference.dequantize(q, MXINT8).double(), values)
    # `rceil` leaves nothing above 127/64, so that nothing is cut off.
    least = reference.quantize(weight, Format("int8", 32, scale="e8m0", scale_mode="rceil"))
    error = (reference.dequantize(least, MXINT8) - weight).unflatten(1, (-1, 32)).abs().amax(-1)
    assert (error <= reference.e8m0_to_float(least.scale) / 128).all()


@pytest.mark.parametrize("bits", PLANES)
def test_planes_of_codes(bits: int) -> None:
    """The lower bits of all codes lie first, then the upper ones, each from a byte on."""
    low = PLANES[bits][0]
    codes = torch.arange(37, dtype=torch.int32).mul(7) % (1 << bits)
    packed = reference.pack_codes(codes.to(torch.uint8)[None], bits)[0].tolist()
    first = -(-37 * low // 8)
    assert len(packed) == first + -(-37 * (bits - low) // 8)
    lower = int.from_bytes(bytes(packed[:first]), "little")
    upper = int.from_bytes(bytes(packed[first:]), "little")
    for k, code in enumerate(codes.tolist()):
        assert lower >> k * low & (1 << low) - 1 == code & (1 << low) - 1
        assert upper >> k * (bits - low) & (1 << (bits - low)) - 1 == code >> low


@pytest.mark.parametrize("fmt", PACKED, ids=format_id)
@pytest.mark.parametrize("columns", [1, 31, 33, 172])
def test_packing_and_back(fmt: Format, columns: int) -> None:
    weight = weights(5, columns)
    q = reference.quantize(weight, fmt)
    packed = pack(q, fmt)
    for name, (dtype, shape) in packed_spec(fmt, 5, columns).items():
        tensor = getattr(packed, name)
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
    for got, expected in zip(unpack(packed, fmt, columns), q, strict=True):
        assert (got is None) == (expected is None)
        assert got is None or torch.equal(got, expected)
    bits = 8 * sum(t.numel() * t.element_size() for t in packed if t is not None)
    assert bits == 8 * (5 * fmt.row_bytes(columns) + fmt.tensor_bytes)


@pytest.mark.parametrize("fmt", MORE_FORMATS, ids=format_id)
def test_search_is_no_worse_than_the_nearest(fmt: Format) -> None:
    weight = weights()
    errors = [
        (reference.dequantize(q, fmt) - weight).square().sum()
        for q in (compensate.search(weight, fmt), reference.quantize(weight, fmt))
    ]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("fmt", MORE_FORMATS, ids=format_id)
def test_numbers_that_are_none_and_zeros(fmt: Format) -> None:
    x = torch.ones(3, 64)
    x[0] = 0
    x[1, 3] = torch.inf
    values = reference.fake_quantize(x, fmt)
    assert (values[0] == 0).all()
    assert values[1, : fmt.group_size or 64].isnan().all()
    # A scale in e4m3 is off by 1/16 at most, and 1 is a code of floats times a power of two.
    assert torch.allclose(values[2], x[2], rtol=2.0**-4, atol=0)


@pytest.mark.parametrize("fmt", MORE_FORMATS, ids=format_id)
def test_rows_of_activations_do_not_depend_on_each_other(fmt: Format) -> None:
    x = weights()
    alone = torch.cat([reference.fake_quantize(row[None], fmt) for row in x])
    together = reference.fake_quantize(x, fmt)
    assert torch.equal(alone, together) == (fmt.tensor_scale != "tensor")


def test_rows_of_a_packed_weight_keep_the_scale_of_the_tensor() -> None:
    q = reference.quantize(weights(), NVFP4)
    packed = pack(q, NVFP4)
    values = reference.dequantize(q, NVFP4)
    some = unpack(packed.rows(torch.tensor([5, 2])), NVFP4, 256)
    assert torch.equal(reference.dequantize(some, NVFP4), values[[5, 2]])


# --- operations: whoever holds a format, and nobody else -----------------------------------------


@pytest.fixture
def first_formats_only(chosen_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the native library knew no others."""
    monkeypatch.setattr(cpu, "HELD", schemes.FIRST_FORMATS)


def assert_as_the_reference(fmt: Format) -> None:
    expected = calls(fmt, "reference")
    for name, call in calls(fmt, None).items():
        if refuses(reference_backend, name, fmt):
            continue
        for a, b in zip(as_list(call()), as_list(expected[name]()), strict=True):
            # Products and statistics differ by the order of float32 sums; all else is equal.
            assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-5 * top(b)), name


def test_every_operation_holds_every_format() -> None:
    for fmt in MORE_FORMATS:
        assert cpu.holds(fmt)
        assert_as_the_reference(fmt)


def test_what_no_operation_can_be_given_is_refused(matrix: Matrix, isa: str) -> None:
    check_refusals(matrix, "cpu", isa)


@pytest.mark.parametrize("fmt", [NVFP4, FP8, MXFP6, Format("int5", 32)], ids=format_id)
def test_a_backend_without_a_format_refuses_it_and_another_takes_over(
    fmt: Format, first_formats_only: None
) -> None:
    """No operation gives a number by a path that does not know the format."""
    assert_as_the_reference(fmt)
    for name, call in calls(fmt, "cpu").items():
        if not refuses(reference_backend, name, fmt):
            with pytest.raises(UsageError, match="backend 'cpu' cannot take Format"):
                call()


# Formats of activations that meet weights in every format; the others, of which there is less to
# tell apart, meet some.
USUAL = [fmt for fmt in CPU_FORMATS if fmt.scale != "float16" and fmt.scale_mode != "rceil"]
SOME_WEIGHTS = [FORMATS[0], FORMATS[-1], Format("int5", 32, symmetric=False), NVFP4, INT8]


@functools.cache
def packed_and_values(fmt: Format) -> tuple[Packed, Tensor]:
    q = reference.quantize(weights(9, 160), fmt)
    return pack(q, fmt), reference.dequantize(q, fmt).double()


@by_isa
def test_weights_of_every_format_meet_activations_of_every_other(matrix: Matrix, isa: str) -> None:
    """Few tokens and many go different ways."""
    x = weights(33, 160)
    for fmt in CPU_FORMATS:
        if fmt.tensor_scale == "tensor":
            continue
        with matrix.cell("cpu", isa, "activations", fmt):
            rounded = reference.fake_quantize(x, fmt).double()
            for weight in CPU_PACKED if fmt in USUAL else SOME_WEIGHTS:
                packed, values = packed_and_values(weight)
                expected = rounded @ values.T
                allowed = 1e-5 * expected.abs().max()
                for tokens in (1, 33):
                    got = ops.packed_matmul(x[:tokens].clone(), packed, weight, fmt, "cpu")
                    off = (got - expected[:tokens]).abs().max()
                    assert off <= allowed, format_id(weight)


def top(x: Tensor) -> float:
    return x.double().abs().max().item()


def as_list(value: Tensor | Packed) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for t in value if t is not None]


@pytest.mark.parametrize("fmt", PACKED, ids=format_id)
def test_error_compensation_holds_every_format(fmt: Format) -> None:
    """Where inputs are correlated it is better than rounding to nearest with the same search."""
    weight = weights(16, 192)
    mixing = torch.randn(192, 192) + 3 * torch.randn(192, 1)
    x = torch.randn(2048, 192) @ mixing
    (found,) = gptq(weight, Curvature(x.T @ x / 2048), [(fmt, 192)], ops.compensate_group)
    nearest = compensate.search(weight, fmt)
    lost = [
        (x @ (reference.dequantize(q, fmt) - weight).T).square().sum() for q in (found, nearest)
    ]
    assert lost[0] < 0.6 * lost[1]


@functools.cache
def compensated(fmt: Format, columns: int) -> list[tuple[tuple, dict, Group]]:
    """Arguments, and what the slow one gives: scales searched for, and those of a whole given."""
    generator = torch.Generator().manual_seed(columns)
    group = weights(21, columns)
    group[3, columns // 2], group[4], group[5] = torch.nan, 0.0, 2.0**-120
    noise = torch.randn(columns, columns, generator=generator)
    factor = torch.eye(columns) + 0.1 * noise.triu(1)
    arguments = group, factor, torch.rand(columns, generator=generator), fmt
    whole = torch.cat([2 * group, group], 1)
    given: list[dict] = [{}]
    if fmt.tensor_scale:
        given.append({"divisor": compensate.search_tensor_scale(whole, fmt)})
    if fmt.group_size == 0:
        given.append({"known": compensate.search_scales(whole, fmt)})
    return [(arguments, more, compensate.compensate_group(*arguments, **more)) for more in given]


@by_isa
def test_native_compensation_equals_the_slow_one(matrix: Matrix, isa: str) -> None:
    for fmt in CPU_FORMATS:
        # Activations alone have a scale of the tensor for each row.
        kind = "twin" if fmt.tensor_scale == "row" else "equal"
        with matrix.cell("cpu", isa, "compensate_group", fmt, kind):
            for columns in (1, 7, 16, 31, 33, 128, 200, fmt.group_size):
                if not 0 < columns <= (fmt.group_size or columns):
                    continue
                for arguments, more, slow in compensated(fmt, columns):
                    found = ops.compensate_group(*arguments, **more)
                    for a, b in zip(found, slow, strict=True):
                        assert a is b is None or assert_same_bits(a, b) is None


# --- docs/add-a-format.md, followed --------------------------------------------------------------


def test_a_format_that_there_is_not_is_added_by_its_lines_in_one_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """e3m2, OCP's other 6-bit float: the lines that the document's first step asks for."""
    element = schemes.Minifloat(6, 2, -2, 4, 28.0)
    e8m0 = replace(schemes.SCALES["e8m0"], elements=(*schemes.SCALES["e8m0"].elements, "e3m2"))
    monkeypatch.setitem(schemes.MINIFLOATS, "e3m2", element)
    monkeypatch.setattr(schemes, "ELEMENTS", (*schemes.ELEMENTS, "e3m2"))
    monkeypatch.setitem(schemes.SCALES, "e8m0", e8m0)
    monkeypatch.setitem(schemes._FLOATS, "MXFP6E3M2", ("e3m2", "e8m0", 32))
    scheme = schemes.parse_scheme("MXFP6E3M2xMXINT8")
    fmt = scheme.format
    assert Format.from_code(fmt.code) == fmt and not cpu.holds(fmt)
    # By its definition: the nearest of all numbers (1 + m / 4) 2^e, and m / 4 2^-2 below.
    weight = weights(6, 64)
    grid = torch.tensor(
        [m / 4 * 2.0**-2 for m in range(4)]
        + [(1 + m / 4) * 2.0**e for e in range(-2, 5) for m in range(4)]
    )
    q = reference.quantize(weight, fmt)
    scaled = weight.unflatten(1, (-1, 32)) / reference.e8m0_to_float(q.scale)[..., None]
    nearest = (scaled.abs()[..., None] - grid).abs().amin(-1)
    found = reference.dequantize(q, fmt).unflatten(1, (-1, 32))
    found = found / reference.e8m0_to_float(q.scale)[..., None]
    inside = scaled.abs() <= 28
    assert torch.equal((found - scaled).abs()[inside], nearest[inside])
    # And a model in it is planned, packed, written, loaded, and gives what the fake one gives.
    source, out = make_model(tmp_path / "model"), tmp_path / "out"
    names = ("MXFP6E3M2xMXINT8", "MXFP4xMXFP8")
    how = {"effort": "quick", "rounding": "rtn", "eval_nsamples": 0, "seqlen": 32}
    mixbits.quantize_model(source, out=out, schemes=names, avg_bits=5.3, **how)
    packed = mixbits.load(out, dtype=torch.float32)
    recipes = {n: m.recipe for n, m in packed.named_modules() if isinstance(m, PackedLinear)}
    assert {recipe.name for recipe in recipes.values()} == set(names)
    assert packed.config.quantization_config.layout == 2  # whoever knows no such formats refuses
    fake = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    fake_quantize_model(fake, recipes)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        got, expected = packed(ids).logits, fake(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
