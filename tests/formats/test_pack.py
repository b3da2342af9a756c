"""Golden bytes are literals: they are what checkpoints hold, so no code may change them."""

import pytest
import torch
from conftest import FORMATS, assert_same_bits, format_id, hard_rows

from mixbits.formats import reference
from mixbits.formats.pack import pack, packed_spec, unpack
from mixbits.formats.schemes import Format, parse_scheme

COLUMNS = [1, 31, 33, 172, 192]


@pytest.mark.parametrize("fmt", FORMATS, ids=format_id)
@pytest.mark.parametrize("columns", COLUMNS)
def test_round_trip_and_spec(fmt, columns):
    q = reference.quantize(hard_rows(columns, torch.float32), fmt)
    packed = pack(q, fmt)
    spec = packed_spec(fmt, 16, columns)
    stored = {name: value for name, value in packed._asdict().items() if value is not None}
    assert {name: (value.dtype, tuple(value.shape)) for name, value in stored.items()} == spec
    for got, expected in zip(unpack(packed, fmt, columns), q, strict=True):
        if expected is None:
            assert got is None
        else:
            assert_same_bits(got, expected)


def test_sizes_agree_with_row_bytes():
    for fmt in FORMATS:
        for columns in COLUMNS:
            spec = packed_spec(fmt, 3, columns).values()
            total = sum(dtype.itemsize * shape[0] * shape[1] for dtype, shape in spec)
            assert total == 3 * fmt.row_bytes(columns)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", COLUMNS)
def test_every_code_survives(bits, columns):
    codes = (torch.arange(3 * columns).reshape(3, columns) % (1 << bits)).to(torch.uint8)
    packed = reference.pack_codes(codes, bits)
    assert packed.shape == (3, -(-columns * bits // 8))
    assert torch.equal(reference.unpack_codes(packed, bits, columns), codes)


def _packed_bytes(fmt, values):
    packed = pack(reference.quantize(torch.tensor([values]), fmt), fmt)
    return [None if t is None else t[0].view(torch.uint8).tolist() for t in packed[:3]]


def test_golden_mxfp4():
    # Largest 6 = 1.5 * 2^2, so the scale is 2^0, and the values are their own codes' values.
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -6.0]
    codes, scale, _ = _packed_bytes(parse_scheme("MXFP4").weight, values)
    assert codes == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0x0F]
    assert scale == [127]


def test_golden_mxfp8():
    values = [448.0, -448.0, 1.0, -0.0, 2.0**-9, 0.4375]
    codes, scale, _ = _packed_bytes(parse_scheme("MXFP8").weight, values)
    assert codes == [0x7E, 0xFE, 0x38, 0x80, 0x01, 0x2E]
    assert scale == [127]
    codes, scale, _ = _packed_bytes(parse_scheme("MXFP8E5M2").weight, [57344.0, -1.0, 2.0**-16])
    assert codes == [0x7B, 0xBC, 0x01]
    assert scale == [127]


def test_golden_int4_symmetric():
    # The largest magnitude is negative: it gets code 0, and the scale 1.0 = 0x3c00 is positive.
    codes, scale, zero = _packed_bytes(Format("int4", 128), [-8.0, 7.0, 0.0, 1.0, -1.0])
    assert (codes, scale, zero) == ([0xF0, 0x98, 0x07], [0x00, 0x3C], None)
    # Now it is positive: the scale is negative, -1.0 = 0xbc00.
    codes, scale, zero = _packed_bytes(Format("int4", 128), [8.0, -7.0, 0.0, 1.0, -1.0])
    assert (codes, scale, zero) == ([0xF0, 0x78, 0x09], [0x00, 0xBC], None)


def test_golden_int2_asymmetric():
    # Two groups: 0..3 has zero point 0, -3..0 has zero point 3; scales 1.0.
    values = [0.0, 1.0, 2.0, 3.0] * 8 + [0.0, -1.0, -2.0, -3.0, 0.0]
    codes, scale, zero = _packed_bytes(Format("int2", 32, symmetric=False), values)
    assert codes == [0b11100100] * 8 + [0b00011011, 0b00000011]
    assert scale == [0x00, 0x3C, 0x00, 0x3C]
    assert zero == [0b1100]


def test_golden_int8_asymmetric():
    codes, scale, zero = _packed_bytes(Format("int8", 64, symmetric=False), [-55.0, 200.0, 0.4])
    assert (codes, scale, zero) == ([0, 255, 55], [0x00, 0x3C], [55])
