"""MXFP4 weights as 8-bit floats: what fits, that nothing is rounded, and what becomes of tokens."""

import pytest
import torch
from compiled import needs_gpp, output_of
from conftest import assert_same_bits
from torch import Tensor

from mixbits import ops
from mixbits.errors import UsageError
from mixbits.formats import fp8_weights as folding
from mixbits.formats import pack, reference
from mixbits.formats.recipes import parse_recipe
from mixbits.formats.schemes import MINIFLOATS, Format
from mixbits.runtime.linear import PackedLinear, allow_fp8_activations

MXFP4 = Format("e2m1", 32)
E4M3 = torch.float8_e4m3fn


def packed_blocks(scales: Tensor, codes: Tensor | None = None) -> pack.Packed:
    """Rows of blocks with these scales [N, blocks]; all codes occur in each, or those given."""
    rows, blocks = scales.shape
    if codes is None:
        codes = torch.arange(16, dtype=torch.uint8).repeat(rows, 2 * blocks)
    return pack.pack(reference.Quantized(codes, scales.to(torch.uint8)), MXFP4)


def fits_by_value(packed: pack.Packed, columns: int) -> list[bool]:
    """The slow twin: a row fits where some power of two makes numbers of e4m3 of all its values."""
    q = pack.unpack(packed, MXFP4, columns)
    values = reference.minifloat_decode(q.codes, MINIFLOATS["e2m1"]).double()
    values *= torch.exp2(q.scale.double() - 127).repeat_interleave(32, 1)
    found = []
    for row in values:
        scaled = (row * 2.0**-e for e in range(-160, 140))
        found.append(any(torch.equal(s, s.float().to(E4M3).double()) for s in scaled))
    return found


def test_every_pair_of_scales_is_judged_by_what_e4m3_can_hold():
    """Blocks that hold all codes: 14 binades apart fit, 15 do not, at every height."""
    for low in (0, 1, 5, 6, 7, 8, 100, 239, 240, 253, 254):
        for spread in (0, 1, 13, 14, 15, 16, 40):
            if low + spread > 254:
                continue
            packed = packed_blocks(torch.tensor([[low, low + spread, low]]))
            scale = folding.fold_rows(packed)
            assert (scale is not None) == (spread <= 14) == fits_by_value(packed, 96)[0]
            if scale is not None:
                assert low - int(scale) >= -8 and low + spread - int(scale) <= 6
                assert int(scale) >= 1


def test_one_row_that_does_not_fit_decides():
    scales = torch.tensor([[120, 130], [120, 134], [7, 21], [120, 135]])
    assert folding.fold_rows(packed_blocks(scales)) is None
    assert folding.fold_rows(packed_blocks(scales[:3])).tolist() == [124, 128, 15]


@pytest.mark.parametrize("zero", [0, 8], ids=["+0", "-0"])
def test_blocks_of_zeros_fit_anything(zero):
    codes = torch.arange(16, dtype=torch.uint8).repeat(3, 6)
    codes[:, 32:64] = zero
    codes[2] = zero
    packed = packed_blocks(torch.tensor([[120, 0, 134], [120, 254, 134], [3, 254, 0]]), codes)
    scale = folding.fold_rows(packed)
    assert scale.tolist() == [128, 128, 1]
    weight = folding.folded(packed, scale, 96).float() * reference.e8m0_to_float(scale)[:, None]
    assert_same_bits(weight, reference.dequantize(pack.unpack(packed, MXFP4, 96), MXFP4))
    codes[0, 40] = 1  # one half in the block of zeros
    assert folding.fold_rows(packed_blocks(packed.weight_scale, codes)) is None


def test_a_nan_scale_fits_nowhere():
    """Not even on a block of zeros, which it makes NaN."""
    codes = torch.zeros((1, 64), dtype=torch.uint8)
    assert folding.fold_rows(packed_blocks(torch.tensor([[120, 255]]), codes)) is None


@pytest.mark.parametrize("columns", [1, 33, 172, 320])
def test_folded_weights_are_the_weights(columns):
    """Random weights whose rows have scales of all sizes; a short last block."""
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(40, columns, generator=generator)
    weight *= torch.logspace(-36, 36, 40)[:, None]
    packed = ops.quantize_pack(weight, MXFP4)
    scale = folding.fold_rows(packed)
    codes = folding.folded(packed, scale, columns)
    assert codes.dtype == E4M3
    exact = codes.double() * reference.e8m0_to_float(scale).double()[:, None]
    assert torch.equal(exact, ops.dequantize(packed, MXFP4, columns).double())


def test_tokens_become_e4m3():
    """The largest magnitude becomes 448; errors are at most half a last digit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 70, generator=generator) * torch.logspace(-28, 36, 60)[:, None]
    codes, scale = folding.quantize_tokens(x)
    back = codes.double() * scale.double()[:, None]
    largest = x.double().abs().amax(1)
    torch.testing.assert_close(back.abs().amax(1), largest, rtol=2.0**-20, atol=0)
    # Half a digit of 4, or half of e4m3's smallest number; and the roundings of two scales.
    allowed = (1 + 2.0**-20) * torch.maximum(
        2.0**-4 * x.double().abs(), largest[:, None] * 2.0**-18
    )
    assert ((back - x.double()).abs() <= allowed).all()


def test_tokens_of_extreme_sizes():
    extreme = torch.tensor([[0.0, 0.0], [2.0**-126, -(2.0**-149)], [3e38, 1.0]])
    codes, scale = folding.quantize_tokens(extreme)
    assert scale.isfinite().all() and (scale > 0).all()
    assert codes.float().tolist() == [[0, 0], [0, 0], [448, 0]]
    bad = torch.tensor([[torch.inf, 1.0], [1.0, torch.nan], [-torch.inf, torch.nan]])
    assert folding.quantize_tokens(bad)[1].isnan().all()


def test_the_product_is_that_of_rounded_tokens():
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(20, 96, generator=generator), torch.randn(5, 96, generator=generator)
    packed = ops.quantize_pack(weight, MXFP4)
    got = folding.matmul(x, packed, folding.fold_rows(packed))
    codes, scale = folding.quantize_tokens(x)
    rounded = codes.double() * scale.double()[:, None]
    exact = rounded @ ops.dequantize(packed, MXFP4, 96).double().T
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    assert got.dtype == x.dtype


def test_the_error_of_rounded_tokens_is_what_the_documents_say():
    generator = torch.Generator().manual_seed(3)
    weight, x = (torch.randn(n, 1024, generator=generator) for n in (200, 100))
    packed = ops.quantize_pack(weight, MXFP4)
    got = folding.matmul(x, packed, folding.fold_rows(packed)).double()
    exact = x.double() @ ops.dequantize(packed, MXFP4, 1024).double().T
    assert 0.025 < (got - exact).norm() / exact.norm() < 0.028


# --- the arithmetic of csrc/fold.h -----------------------------------------------------------

FOLD_PROGRAM = r"""
#include <stdio.h>
#include "fold.h"
using namespace mixbits;
template <class T>
void put(T value) { fwrite(&value, sizeof(value), 1, stdout); }
int main() {
  for (int k = -8; k <= 6; ++k) put(fold_table(k));
  for (int k = -400; k <= 400; ++k) put(fold_table(k).low & 0xff);
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const TokenScale scale = token_scale((bits & 0x7fff) << 16 | (bits & 0x8000));
    put(scale.scale), put(scale.inverse);
  }
}
"""


@needs_gpp
def test_host_arithmetic(tmp_path):
    """Tables hold every magnitude times every 2^k; token scales are torch's, NaN aside."""
    output = output_of(FOLD_PROGRAM, tmp_path)
    magnitudes = reference.minifloat_decode(torch.arange(8, dtype=torch.uint8), MINIFLOATS["e2m1"])
    exact = magnitudes * torch.logspace(-8, 6, 15, base=2.0)[:, None]
    tables = torch.frombuffer(bytearray(output[: 15 * 8]), dtype=E4M3).view(15, 8)
    assert torch.equal(tables.double(), exact.double())
    zeros = torch.frombuffer(bytearray(output[120 : 120 + 801 * 4]), dtype=torch.int32)
    assert not zeros.any()  # what a block of zeros takes, whatever its scale
    found = torch.frombuffer(bytearray(output[120 + 801 * 4 :]), dtype=torch.float32).view(-1, 2)
    index = torch.arange(1 << 16)
    x = ((index & 0x7FFF) << 16 | index & 0x8000).int().view(torch.float32)
    codes, scale = folding.quantize_tokens(x[:, None])
    torch.testing.assert_close(found[:, 0], scale, rtol=0, atol=0, equal_nan=True)
    finite = x.isfinite()
    torch.testing.assert_close((x * found[:, 1])[finite].to(E4M3).float(), codes[finite, 0].float())


# --- who may ask for it ----------------------------------------------------------------------


def packed_model(*schemes: str) -> torch.nn.Sequential:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    return torch.nn.Sequential(
        *(PackedLinear.from_weight(weight, parse_recipe(name)) for name in schemes)
    )


def test_only_mxfp4a16_linears_that_fit_are_allowed():
    model = packed_model("MXFP4A16", "MXFP4", "MXFP8A16", "W4A16", "MXFP4A16")
    model[4].weight_scale[3] = torch.tensor([100, 115], dtype=torch.uint8)
    allow_fp8_activations(model)
    assert [one.row_scale is not None for one in model] == [True, False, False, False, False]
    assert "fp8" in repr(model[0]) and "fp8" not in repr(model[4])
    assert "row_scale" not in "".join(model.state_dict())
    assert model[0].row_scale.dtype == model[0].to(torch.bfloat16).row_scale.dtype == torch.uint8


def test_refusals():
    with pytest.raises(UsageError, match="got 0 MXFP4A16 linears of 2 packed in one scheme"):
        allow_fp8_activations(packed_model("MXFP4", "W4A16"))
    linear = packed_model("MXFP4A16", "W4A16")
    allow_fp8_activations(linear)
    with pytest.raises(UsageError, match="the cuda backend is needed: got cpu on cpu"):
        linear[0](torch.randn(2, 64))
    packed, fmt, _ = linear[1].operand.parts[0]
    with pytest.raises(UsageError, match="need weights in MXFP4: got int4"):
        ops.fold_rows(packed, fmt, 64)


def test_a_gpu_of_another_kind_is_refused(monkeypatch):
    from mixbits.backends import cuda
    from mixbits.backends.cuda_choice import Device

    monkeypatch.setattr(ops, "choose_backend", lambda device_type, requested: "cuda")
    monkeypatch.setattr(cuda, "_device", lambda device: Device((8, 0)))
    with pytest.raises(UsageError, match=r"compute capability 9\.0 is needed: got 8\.0"):
        ops.require_fp8("cuda")
