"""Equality with AutoRound's own functions, and every difference there is, with its reason.

| where | AutoRound | mixbits | why |
|---|---|---|---|
| a block of zeros | byte 126 (e2m1), 120 (e4m3), rceil 128 | 0 | as microxcaling; equal values |
| exact -0.0 | +0.0 | -0.0 | torch's float8 casts keep the sign; equal values |
| float32 maximum 1-7 ulp below 2^k | exponent one too large | exact | it takes log2 in float32 |
| NaN or Inf in a block | all NaN, exponent undefined | all NaN, byte 255 | e8m0 has a NaN |
| int, fp16 input | divides in fp16 | in float32 | a quotient is rounded once, not twice |
| int asym, bf16/fp16 input | range in bf16/fp16 | in float32 | the same |
| int asym, scale below 6e-5 | zero point may pass 2^bits - 1 | clamped | it must fit its bits |
| int, NaN or Inf | NaN or arbitrary | NaN scale, NaN values | never a plausible number |

A bfloat16 or float16 maximum cannot be within 7 float32 ulp of a power of two, so log2 is exact
there. All of it runs in float32 on both sides, with float16 scales for integers.
"""

from __future__ import annotations

import math

import pytest
import torch

from mixbits import ops
from mixbits.formats.reference import mx_scale, quantize
from mixbits.formats.schemes import Format

pytest.importorskip("auto_round", reason="auto-round is not installed")
from auto_round.data_type.int import quant_tensor_asym, quant_tensor_sym
from auto_round.data_type.mxfp import quant_mx, quant_mx_rceil

DATA_TYPES = {"e2m1": ("mx_fp4", 4), "e4m3": ("mx_fp8", 8), "e5m2": ("mx_fp8e5m2", 8)}
ELEMENTS = list(DATA_TYPES)


def million(dtype: torch.dtype) -> torch.Tensor:
    """A million values [8192, 128]; blocks of 32 have exponents -20..8 and some zeros."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(8192, 128, generator=generator)
    exponents = torch.randint(-20, 9, (8192, 4), generator=generator).float()
    x = x * torch.exp2(exponents).repeat_interleave(32, dim=1)
    x[torch.rand(x.shape, generator=generator) < 0.01] = 0
    return x.to(dtype)


def their_mx(
    x: torch.Tensor, element: str, mode: str = "floor"
) -> tuple[torch.Tensor, torch.Tensor]:
    data_type, bits = DATA_TYPES[element]
    function = quant_mx if mode == "floor" else quant_mx_rceil
    values, exponent, _ = function(x.clone(), bits=bits, group_size=32, data_type=data_type)
    return values, exponent


def our_mx(x: torch.Tensor, element: str, mode: str = "floor") -> torch.Tensor:
    return ops.fake_quantize(x, Format(element, 32, scale_mode=mode))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", ["floor", "rceil"])
@pytest.mark.parametrize("element", ELEMENTS)
def test_mx_on_a_million_values(element, mode, dtype):
    x = million(dtype)
    assert torch.equal(our_mx(x, element, mode), their_mx(x, element, mode)[0])


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_int_on_a_million_values(bits, group):
    x = million(torch.bfloat16)
    symmetric = quant_tensor_sym(x.clone(), bits=bits, group_size=group)[0]
    assert torch.equal(ops.fake_quantize(x, Format(f"int{bits}", group)), symmetric)
    asymmetric = quant_tensor_asym(x.float(), bits=bits, group_size=group)[0].bfloat16()
    ours = ops.fake_quantize(x, Format(f"int{bits}", group, symmetric=False))
    assert torch.equal(ours, asymmetric)


@pytest.mark.parametrize("columns", [1, 31, 33, 172])
def test_short_last_groups(columns):
    x = million(torch.bfloat16)[:, : min(columns, 128)]
    x = torch.cat([x, x], 1)[:, :columns] if columns > 128 else x
    for element in ELEMENTS:
        assert torch.equal(our_mx(x, element), their_mx(x, element)[0])
    for bits in (2, 4, 8):
        theirs = quant_tensor_sym(x.clone(), bits=bits, group_size=128)[0].reshape(x.shape)
        assert torch.equal(ops.fake_quantize(x, Format(f"int{bits}", 128)), theirs)


def block(*values: float) -> torch.Tensor:
    return torch.tensor([[*values, *([0.0] * (32 - len(values)))]])


def test_ties_and_clamping():
    x = block(4.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.5, 7.9)  # scale 2^0
    expected = block(4.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0)
    assert torch.equal(our_mx(x, "e2m1"), expected)
    assert torch.equal(their_mx(x, "e2m1")[0], expected)
    x = block(7.9)  # e4m3: 7.9 / 2^-6 = 505.6 is clamped to 448
    assert our_mx(x, "e4m3")[0, 0] == their_mx(x, "e4m3")[0][0, 0] == 7.0


def test_signed_full_range_integer_scale():
    x = torch.tensor([[3.0, -2.0, 1.0, 0.5]])
    assert quantize(x, Format("int4", 32)).scale.item() == -0.375
    theirs = quant_tensor_sym(x.clone(), bits=4, group_size=32)
    assert theirs[1].item() == -0.375
    assert torch.equal(ops.fake_quantize(x, Format("int4", 32)), theirs[0])


def test_rceil_may_round_the_largest_floats_to_infinity():
    x = block(torch.finfo(torch.float32).max)  # 3.9999998 * 2^126 rounds to 4 * 2^126
    assert our_mx(x, "e2m1", "rceil")[0, 0] == their_mx(x, "e2m1", "rceil")[0][0, 0] == math.inf


@pytest.mark.parametrize("element", ELEMENTS)
def test_smallest_and_largest_blocks(element):
    for exponent in (-149, -140, -127, -126, -120, 100, 126, 127):
        x = block(1.5 * 2.0**exponent if exponent > -149 else 2.0**-149, -(2.0**-149))
        assert torch.equal(our_mx(x, element), their_mx(x, element)[0]), exponent


# --- differences: each stays as listed above --------------------------------------------------


@pytest.mark.parametrize(("element", "byte"), [("e2m1", 126), ("e4m3", 120)])
def test_difference_scale_of_zero_blocks(element, byte):
    x = block()
    assert their_mx(x, element)[1].item() + 127 == byte
    assert their_mx(x, element, "rceil")[1].item() + 127 == 128
    for mode in ("floor", "rceil"):
        assert quantize(x, Format(element, 32, scale_mode=mode)).scale.item() == 0
        assert torch.equal(our_mx(x, element, mode), their_mx(x, element, mode)[0])


def test_difference_sign_of_zero():
    x = block(4.0, -0.0)
    assert torch.signbit(our_mx(x, "e2m1")[0, 1]) and not torch.signbit(
        their_mx(x, "e2m1")[0][0, 1]
    )


def test_difference_maximum_just_below_a_power_of_two():
    powers = torch.exp2(torch.arange(-60.0, 60.0))
    x = torch.zeros(len(powers), 32)
    x[:, 0] = torch.nextafter(powers, torch.zeros(()))
    exponents = mx_scale(x.amax(-1), Format("e2m1", 32)).int() - 127
    assert torch.equal(exponents, torch.arange(-60, 60) - 1 - 2)
    theirs = their_mx(x, "e2m1")[1].flatten().int()
    # Their float32 log2 rounds up to the integer for most of them, on CPUs with vector units.
    assert ((theirs == exponents) | (theirs == exponents + 1)).all()
    # No 16-bit number is so close to a power of two.
    for dtype in (torch.bfloat16, torch.float16):
        near = block(4.0 * (1 - 2.0 ** -(8 if dtype == torch.bfloat16 else 11))).to(dtype)
        assert torch.equal(our_mx(near, "e2m1"), their_mx(near, "e2m1")[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_difference_non_finite_blocks(bad):
    x = torch.cat([block(bad, 1.0), block(1.0)], dim=1)
    ours = our_mx(x, "e2m1")
    assert ours[0, :32].isnan().all() and ours[0, 32] == 1.0
    assert quantize(x, Format("e2m1", 32)).scale[0].tolist()[0] == 255
    for symmetric in (True, False):
        ours = ops.fake_quantize(x, Format("int4", 32, symmetric=symmetric))
        assert ours[0, :32].isnan().all() and ours[0, 32:].isfinite().all()


def test_difference_fp16_input_of_integers():
    x = million(torch.float16)
    ours = ops.fake_quantize(x, Format("int8", 128))
    theirs = quant_tensor_sym(x.clone(), bits=8, group_size=128)[0]
    exact = quant_tensor_sym(x.float(), bits=8, group_size=128)[0].half()
    assert torch.equal(ours, exact)
    assert 0 < (ours != theirs).float().mean() < 0.05  # ties and near-ties only


def test_difference_bf16_input_of_asymmetric_integers():
    x = million(torch.bfloat16)
    ours = ops.fake_quantize(x, Format("int4", 128, symmetric=False))
    assert not torch.equal(ours, quant_tensor_asym(x.clone(), bits=4, group_size=128)[0])


def test_difference_zero_point_that_would_not_fit():
    x = torch.linspace(-3.3e-3, 0, 128)[None]  # a scale among float16's subnormals
    zero_point = quant_tensor_asym(x.clone(), bits=8, group_size=128)[2]
    ours = quantize(x, Format("int8", 128, symmetric=False)).zero_point
    assert ours is not None and ours.item() == min(int(zero_point.item()), 255)
