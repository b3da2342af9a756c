import pytest
from conftest import FORMATS, format_id

from mixbits.errors import UsageError
from mixbits.formats.schemes import BF16, ELEMENTS, SCALE_MODES, SCHEME_NAMES, Format, parse_scheme


@pytest.mark.parametrize("fmt", FORMATS, ids=format_id)
def test_code_round_trip(fmt):
    assert Format.from_code(fmt.code) == fmt
    assert fmt.code > 0  # 0 stands for "no format" in native code


def test_codes_are_distinct():
    assert len({fmt.code for fmt in FORMATS}) == len(FORMATS)


def test_order_of_native_numbers():
    # csrc/formats.h spells these out: a new order here would be read as another format there.
    assert ELEMENTS == ("e2m1", "e4m3", "e5m2", "int2", "int4", "int8")
    assert SCALE_MODES == ("floor", "rceil", "even")
    assert Format("e4m3", 32, scale_mode="even").code == 1 | 2 << 8 | 1 << 12 | 32 << 16
    assert Format("int4", 128, symmetric=False).code == 4 | 128 << 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("e3m2", 32), "element must be one of .*: got 'e3m2'"),
        (("e2m1", 16), r"group_size of e2m1 must be one of \(32,\): got 16"),
        (("int4", 96), r"group_size of int4 must be one of \(32, 64, 128\): got 96"),
        (("e2m1", 32, True, "up"), "scale mode must be one of floor, rceil, even: got 'up'"),
    ],
)
def test_refused_formats(arguments, message):
    with pytest.raises(UsageError, match=message):
        Format(*arguments)


@pytest.mark.parametrize(
    ("name", "columns", "row_bytes"),
    [
        ("MXFP4", 4096, 2048 + 128),
        ("MXFP4", 33, 17 + 2),
        ("MXFP8", 31, 31 + 1),
        ("W4A16", 4096, 2048 + 64),
        ("W4A16ASYM", 4096, 2048 + 64 + 16),
        ("W2A16G32ASYM", 172, 43 + 12 + 2),
        ("W8A16", 1, 1 + 2),
    ],
)
def test_bytes_of_a_row(name, columns, row_bytes):
    scheme = parse_scheme(name)
    assert scheme.weight.row_bytes(columns) == row_bytes
    assert scheme.storage_bits(7, columns) == 7 * 8 * row_bytes


def test_bits_of_bf16():
    assert BF16.storage_bits(3, 5) == 16 * 15
    assert BF16.element_bits == 16


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("mxfp4", "MXFP4"),
        ("MXFP8E4M3A16", "MXFP8A16"),
        ("mxfp8e5m2", "MXFP8E5M2"),
        ("W4A16G128", "W4A16"),
        ("w4a16g64asym", "W4A16G64ASYM"),
        ("bf16", "BF16"),
    ],
)
def test_scheme_names(name, canonical):
    scheme = parse_scheme(name)
    assert scheme.name == canonical
    assert parse_scheme(canonical) == scheme


def test_scheme_parts():
    scheme = parse_scheme("MXFP4", weight_scale_mode="rceil", act_scale_mode="even")
    assert scheme.weight == Format("e2m1", 32, scale_mode="rceil")
    assert scheme.activation == Format("e2m1", 32, scale_mode="even")
    assert parse_scheme("MXFP4A16").activation is None
    assert parse_scheme("W4A16").activation is None


@pytest.mark.parametrize("name", ["MXFP6", "MXFP4E4M3", "W3A16", "W4A16G96", "W4A8", ""])
def test_unknown_schemes_list_the_known(name):
    with pytest.raises(UsageError) as error:
        parse_scheme(name)
    assert SCHEME_NAMES in str(error.value)
