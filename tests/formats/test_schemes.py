import pytest
from conftest import FORMATS, MORE_FORMATS, format_id

from mixbits.errors import UsageError
from mixbits.formats.schemes import (
    BF16,
    ELEMENTS,
    ROW,
    SCALE_MODES,
    SCALES,
    SCHEME_NAMES,
    Format,
    parse_scheme,
    weight_only,
)


@pytest.mark.parametrize("fmt", FORMATS + MORE_FORMATS, ids=format_id)
def test_code_round_trip(fmt):
    assert Format.from_code(fmt.code) == fmt
    assert fmt.code > 0  # 0 stands for "no format" in native code


def test_codes_are_distinct():
    formats = FORMATS + MORE_FORMATS
    assert len({fmt.code for fmt in formats}) == len(set(formats)) == 55


def test_order_of_native_numbers():
    # csrc/formats.h spells these out: a new order here would be read as another format there.
    assert ELEMENTS[:6] == ("e2m1", "e4m3", "e5m2", "int2", "int4", "int8")
    assert ELEMENTS[6:] == ("e2m3", "int3", "int5", "int6")
    assert list(SCALES) == ["e8m0", "float16", "e4m3", "float32"]
    assert SCALE_MODES == ("floor", "rceil", "even")
    assert Format("e4m3", 32, scale_mode="even").code == 1 | 2 << 8 | 1 << 12 | 32 << 16
    assert Format("int4", 128, symmetric=False).code == 4 | 1 << 13 | 128 << 16
    nvfp4 = Format("e2m1", 16, scale="e4m3", tensor_scale="row")
    assert nvfp4.code == 0 | 1 << 12 | 2 << 13 | 1 << 15 | 16 << 16
    assert Format("int8", ROW, scale="float32").code == 5 | 1 << 12 | 3 << 13


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("e3m2", 32), "element must be one of .*: got 'e3m2'"),
        (("e2m1", 16), r"group_size of e2m1 with scales in e8m0 must be one of \(32,\): got 16"),
        (("int4", 96), r"group_size of int4 with .* one of \(32, 64, 128\): got 96"),
        (("e2m1", 32, True, "floor", "e4m3"), r"in e4m3 must be one of \(16,\): got 32"),
        (("int4", 32, True, "floor", "e8m0"), "scale of int4 must be one of float16: got 'e8m0'"),
        (("e2m3", 32, True, "floor", "float32"), "scale of e2m3 must be one of e8m0"),
        (("int8", 32, False, "floor", "e8m0"), "symmetric must be True"),
        (("e2m1", 32, True, "floor", "e8m0", "row"), "tensor_scale beside scales in e8m0"),
        (("e2m1", 16, True, "floor", "e4m3", "block"), "tensor_scale beside .* got 'block'"),
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
        ("W3A16G32", 33, 9 + 5 + 2 * 2),
        ("W5A16ASYM", 130, 65 + 17 + 2 * 2 + 2),
        ("MXFP6", 31, 16 + 8 + 1),
        ("FP8", 31, 31 + 4),
        ("MXINT8", 33, 33 + 2),
    ],
)
def test_bytes_of_a_row(name, columns, row_bytes):
    scheme = parse_scheme(name)
    assert scheme.weight.row_bytes(columns) == row_bytes
    assert scheme.storage_bits(7, columns) == 7 * 8 * row_bytes


def test_the_scale_of_a_tensor_counts_once():
    assert parse_scheme("NVFP4").storage_bits(7, 33) == 8 * (7 * (17 + 3) + 4)


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
        ("mxfp4XMXFP8", "MXFP4xMXFP8"),
        ("MXFP8xMXFP8", "MXFP8"),
        ("MXFP6A8", "MXFP6xMXFP8"),
        ("w4afp8", "W4xFP8"),
        ("W4G128ASYMxINT8", "W4ASYMxINT8"),
        ("W4G32xMXINT8", "W4G32xMXINT8"),
        ("NVFP4A16", "NVFP4A16"),
    ],
)
def test_scheme_names(name, canonical):
    scheme = parse_scheme(name)
    assert scheme.name == canonical
    assert parse_scheme(canonical) == scheme


def test_activations_of_every_kind():
    """Rows of activations share no scale: what a token becomes must not depend on others."""
    for name, element, scale, group, per in (
        ("MXFP4", "e2m1", "e8m0", 32, ""),
        ("MXFP6", "e2m3", "e8m0", 32, ""),
        ("MXFP8", "e4m3", "e8m0", 32, ""),
        ("MXINT8", "int8", "e8m0", 32, ""),
        ("NVFP4", "e2m1", "e4m3", 16, "row"),
        ("FP8", "e4m3", "float32", ROW, ""),
        ("INT8", "int8", "float32", ROW, ""),
    ):
        scheme = parse_scheme(f"W3ASYMx{name}")
        assert scheme.weight == Format("int3", 128, symmetric=False)
        wanted = Format(element, group, scale=scale, tensor_scale=per)
        assert scheme.activation == wanted
    assert parse_scheme("NVFP4").weight.tensor_scale == "tensor"


@pytest.mark.parametrize("fmt", FORMATS + MORE_FORMATS, ids=format_id)
def test_every_format_of_weights_has_a_weight_only_scheme(fmt):
    is_scheme = fmt.tensor_scale != "row" and (fmt.element, fmt.scale) != ("int8", "float32")
    if is_scheme:
        assert weight_only(fmt).weight == fmt
        assert weight_only(fmt).activation is None


def test_scheme_parts():
    scheme = parse_scheme("MXFP4", weight_scale_mode="rceil", act_scale_mode="even")
    assert scheme.weight == Format("e2m1", 32, scale_mode="rceil")
    assert scheme.activation == Format("e2m1", 32, scale_mode="even")
    assert parse_scheme("MXFP4A16").activation is None
    assert parse_scheme("W4A16").activation is None


@pytest.mark.parametrize(
    "name",
    [
        "MXFP4E4M3",
        "W7A16",
        "W4A16G96",
        "W4A8",
        "W4",
        "W4A16xFP8",
        "MXFP4xW4",
        "FP8xMXFP4xFP8",
        "INT8",
        "",
    ],
)
def test_unknown_schemes_list_the_known(name):
    with pytest.raises(UsageError) as error:
        parse_scheme(name)
    assert SCHEME_NAMES in str(error.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("W7A16", "W8A16, W6A16, W5A16"), ("nvfp4asym", "NVFP4, NVFP4A16, NVFP4xMXFP8")],
)
def test_unknown_schemes_name_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=rf"BF16 \(nearest: {nearest}\)$"):
        parse_scheme(name)
    for known in nearest.split(", "):
        assert parse_scheme(known).name == known
