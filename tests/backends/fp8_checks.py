"""What is asked of products with activations in 8-bit floats."""

import pytest
import torch
from conftest import MX_FORMATS, assert_same_bits, hard_rows
from torch import Tensor

from mixbits.backends import cuda_fp8
from mixbits.backends.cuda_choice import KernelChoice
from mixbits.formats import fp8_weights as folding
from mixbits.formats import pack, reference

HALVES = [torch.bfloat16, torch.float16]
FP8 = KernelChoice("fp8", block_tokens=128)
MXFP4 = MX_FORMATS[0]


def prepared_codes(prepared: Tensor, tokens: int, columns: int) -> Tensor:
    """[tokens, columns] from the tiles of 128 by 128 that the product reads, said once more."""
    tiles = prepared.view(
        -1, prepared.shape[1] // 128, 128, 8, 16
    )  # block, tile, token, piece, byte
    swizzle = torch.arange(8)[None] ^ torch.arange(128)[:, None] % 8
    pieces = tiles.gather(3, swizzle[None, None, :, :, None].expand_as(tiles))
    # [step, half, lane, code] of a row of 128 bytes -> columns [lane, step, half, code].
    rows = pieces.reshape(*tiles.shape[:3], 4, 2, 4, 4).permute(0, 2, 1, 5, 3, 4, 6)
    return rows.reshape(prepared.shape)[:tokens, :columns]


def check_fp8_tokens(device: torch.device, columns: int) -> None:
    """The codes and scales of the definition, and zeros where there are no tokens and columns."""
    for dtype in HALVES:
        x = torch.cat([hard_rows(columns, dtype), torch.randn(7, columns).to(dtype)])
        x[0] = 0
        prepared, got_scale = cuda_fp8.quantize_tokens(x.to(device))
        codes, scale = folding.quantize_tokens(x)
        assert_same_bits(got_scale[: len(x)].cpu(), scale)
        finite = scale.isfinite()
        assert finite.sum() > 8 and not finite.all()
        got = prepared_codes(prepared.cpu(), len(x), prepared.shape[1])
        assert_same_bits(got[finite, :columns], codes.view(torch.uint8)[finite])
        assert not got[finite, columns:].any()
        assert not prepared_codes(prepared.cpu(), *prepared.shape)[len(x) :].any()


def fp8_product(device: torch.device, x: Tensor, packed: pack.Packed) -> Tensor:
    row_scale = folding.fold_rows(packed)
    there = packed.to(device), MXFP4, row_scale.to(device)
    return cuda_fp8.packed_matmul(x.to(device), *there).cpu()


def check_fp8_matmul(device: torch.device, shape: tuple[int, int, int]) -> None:
    """As check_matmul, of the tokens that 8 bits leave."""
    m, n, k = shape
    generator = torch.Generator().manual_seed(m + n + k)
    weight = torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator)
    q = reference.quantize(weight, MXFP4)
    w = reference.dequantize(q, MXFP4)
    for dtype in HALVES:
        x = torch.randn(m, k, generator=generator).to(dtype)
        codes, scale = folding.quantize_tokens(x)
        rounded = codes.double() * scale.double()[:, None]
        exact = rounded @ w.double().T
        plain = (rounded.float() @ w.T).to(dtype)
        got = fp8_product(device, x, pack.pack(q, MXFP4))
        assert (got.dtype, got.shape) == (dtype, (m, n))
        allowed = 2 * (plain.double() - exact).abs().max().item()
        allowed = max(allowed, torch.finfo(dtype).eps * exact.abs().max().item())
        error = (got.double() - exact).abs().max().item()
        assert error <= allowed, f"{dtype} {shape}: error {error:.3g}, allowed {allowed:.3g}"


def check_fp8_weights(device: torch.device) -> None:
    """Every code in every binade of a row, and zeros beyond them: exact, as the identity shows."""
    rows = torch.arange(20)[:, None]
    scale = (120 + (torch.arange(15) + rows) % 15).to(torch.uint8)
    codes = ((torch.arange(480) + 7 * rows) % 16).to(torch.uint8)
    codes[17, 32:64], scale[17, 1] = 8, 3
    codes[18, 32:64], scale[18, 1] = 0, 250
    codes[19], scale[19] = 0, 254
    q = reference.Quantized(codes, scale)
    got = fp8_product(device, torch.eye(480, dtype=torch.bfloat16), pack.pack(q, MXFP4))
    assert torch.equal(got.T, reference.dequantize(q, MXFP4, torch.bfloat16))


def check_fp8_long_rows(device: torch.device) -> None:
    """Terms of one sign: added in 14 digits throughout, they would lose one part in a hundred."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (0.5 + torch.rand(n, 8192, generator=generator) for n in (8, 3))
    packed = pack.pack(reference.quantize(weight, MXFP4), MXFP4)
    got = fp8_product(device, x.half(), packed)
    expected = folding.matmul(x.half().float(), packed, folding.fold_rows(packed))
    torch.testing.assert_close(got.float(), expected, rtol=2.0**-10, atol=0)


def check_fp8_bad_tokens(device: torch.device) -> None:
    """A token that is not finite is NaN, and no other."""
    x = torch.randn(5, 96, dtype=torch.bfloat16)
    packed = pack.pack(reference.quantize(torch.randn(6, 96), MXFP4), MXFP4)
    expected = fp8_product(device, x, packed)
    x[1, 7], x[3, 90] = torch.nan, -torch.inf
    expected[[1, 3]] = torch.nan
    assert_same_bits(fp8_product(device, x, packed), expected)


FP8_CHECKS = [check_fp8_weights, check_fp8_long_rows, check_fp8_bad_tokens]
each_fp8_check = pytest.mark.parametrize("check", FP8_CHECKS, ids=lambda check: check.__name__)


def use_fp8(monkeypatch: pytest.MonkeyPatch):
    """The products of cuda_fp8, for any number of tokens."""
    monkeypatch.setattr(cuda_fp8, "explain", lambda x, packed, fmt: FP8)
    return cuda_fp8
