"""Streams of bits against integers of any length, and against compressed-tensors' words."""

from __future__ import annotations

import pytest
import torch

from mixbits.formats.reference import pack_codes
from mixbits.formats.words import pack_stream, unpack_stream, words


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 31, 32, 33, 172])
def test_codes_lie_one_behind_the_other(bits: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (3, columns), dtype=torch.uint8, generator=generator)
    codes[0] = (1 << bits) - 1
    stream = pack_stream(codes, bits)
    for row, written in zip(codes.tolist(), stream.tolist(), strict=True):
        number = sum(code << bits * place for place, code in enumerate(row))
        assert bytes(written) == number.to_bytes(-(-columns * bits // 8), "little")
    assert torch.equal(unpack_stream(stream, bits, columns), codes)
    behind = torch.nn.functional.pad(stream, (0, 5), value=255)
    assert torch.equal(unpack_stream(behind, bits, columns), codes)
    if bits in (1, 2, 4, 8):
        assert torch.equal(stream, pack_codes(codes, bits))
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers",
        reason="compressed-tensors is not installed",
    )
    signed = (codes.short() - (1 << bits - 1)).to(torch.int8)
    assert torch.equal(words(stream), helpers.pack_to_int32(signed, bits))
