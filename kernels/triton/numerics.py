"""The arithmetic of every format, as Triton functions that equal mixbits.formats.reference bit for
bit.

A format arrives as one compile-time integer (`Format.code`), so each kernel is specialised for
it and the branches below cost nothing.

MX elements are rounded by adding and removing a power of two: with y of exponent e, adding
2^(e + 23 - mantissa_bits) pushes out exactly the bits that the element cannot hold, and the
hardware's own rounding (to nearest, ties to even) does the rest. What the addition leaves in
the low bits of the sum is the mantissa's integer. Nothing takes a logarithm; exponents are read
from the bits. Scaling by 2^(127 - byte) is exact, or rounds a number so small that it becomes
zero in any case, so that it equals the reference's division.

Integers, and scales that are no powers of two, need a true IEEE division: multiplying by a
reciprocal moves ties.

Scales in e4m3 and in float32 follow from a number of the whole row or tensor, its `base` (`bases`),
which is found before; other formats have none, and read none.

bfloat16 is converted by hand on its bits, in both directions. It is the same result as the
hardware's conversion, and it is also right in the interpreter, whose own conversion truncates
and breaks subnormals. Everything else is float32.
"""

import triton
import triton.language as tl
from mixbits.formats.reference import INT8_UNIT, MIN_INT_SCALE
from mixbits.formats.schemes import (
    ELEMENTS,
    INTEGERS,
    MINIFLOATS,
    PLANES,
    SCALE_MODES,
    SCALES,
    Format,
)

TILE_COLUMNS = 128  # a multiple of every group size, and of a slab
E4M3 = tl.constexpr(ELEMENTS.index("e4m3"))  # its numerics, as those of a format


# --- what a format's number says; evaluated while compiling ----------------------------------


@triton.constexpr_function
def is_float(code):
    return ELEMENTS[code & 0xFF] in MINIFLOATS


@triton.constexpr_function
def scale_mode(code):
    return SCALE_MODES[(code >> 8) & 0xF]


@triton.constexpr_function
def is_symmetric(code):
    return bool((code >> 12) & 1)


@triton.constexpr_function
def scale_kind(code):
    return list(SCALES)[(code >> 13) & 3]


@triton.constexpr_function
def has_base(code):
    """Whether the scales follow from a number of the whole row or tensor."""
    return scale_kind(code) in ("e4m3", "float32")


@triton.constexpr_function
def is_tensor_wide(code):
    """Whether that number is one for all rows."""
    return scale_kind(code) == "e4m3" and not (code >> 15) & 1


@triton.constexpr_function
def group_columns(code, columns):
    """How many of a tile's columns share a scale: all of them, if it is that of the row."""
    return code >> 16 or columns


@triton.constexpr_function
def code_bits(code):
    name = ELEMENTS[code & 0xFF]
    return MINIFLOATS[name].bits if name in MINIFLOATS else INTEGERS[name]


@triton.constexpr_function
def lower_bits(code):
    """Bits of a code in the first plane of a packed row; the others, if any, are in the second."""
    bits = code_bits(code)
    return PLANES[bits][0] if bits in PLANES else bits


@triton.constexpr_function
def unit(code):
    """What the codes count, in scales."""
    return INT8_UNIT if scale_kind(code) == "e8m0" and not is_float(code) else 1.0


@triton.constexpr_function
def mantissa_bits(code):
    return MINIFLOATS[ELEMENTS[code & 0xFF]].mantissa_bits


@triton.constexpr_function
def min_exponent(code):
    return MINIFLOATS[ELEMENTS[code & 0xFF]].min_exponent


@triton.constexpr_function
def largest(code):
    """The largest value under a scale of 1."""
    return max_value(code) if is_float(code) else 127 * INT8_UNIT


@triton.constexpr_function
def max_exponent(code):
    name = ELEMENTS[code & 0xFF]
    return MINIFLOATS[name].max_exponent if name in MINIFLOATS else 0  # 127 / 64 is in [1, 2)


@triton.constexpr_function
def max_mantissa(code):
    """The largest value's fraction as the 23 mantissa bits of a float32."""
    return int((largest(code) / 2.0 ** max_exponent(code) - 1.0) * 2**23)


@triton.constexpr_function
def even_mantissa(code):
    """From which mantissa on the rule `even` takes the next power of two."""
    return 0x600000 if is_float(code) else 0x7F0000


@triton.constexpr_function
def max_value(code):
    return MINIFLOATS[ELEMENTS[code & 0xFF]].max_value


@triton.constexpr_function
def max_code(code):
    """The code of the largest finite value, without sign."""
    element = MINIFLOATS[ELEMENTS[code & 0xFF]]
    fraction = element.max_value / 2.0**element.max_exponent  # in [1, 2)
    lead = (element.max_exponent - element.min_exponent) << element.mantissa_bits
    return lead + int(fraction * 2**element.mantissa_bits)


@triton.constexpr_function
def has_nan(code):
    """Whether some codes stand for no finite value."""
    return max_code(code) < 2 ** (code_bits(code) - 1) - 1


@triton.constexpr_function
def decode_factor(code):
    """A magnitude moved to a float32's exponent and mantissa fields is too small by this."""
    return 2.0 ** (126 + MINIFLOATS[ELEMENTS[code & 0xFF]].min_exponent)


@triton.constexpr_function
def min_int_scale():
    """MIN_INT_SCALE rounded to float16, in Python: 2^-24 is float16's smallest step."""
    return round(MIN_INT_SCALE * 2.0**24) / 2.0**24


def tile_columns(fmt: Format) -> int:
    """Columns of one tile: whole groups, and whole bytes of each plane of packed zero points."""
    groups = 1 if fmt.symmetric else 8 // min(fmt.planes)
    return max(TILE_COLUMNS, fmt.group_size * groups)


# --- float conversions -----------------------------------------------------------------------


@triton.jit
def to_float32(x):
    """float32, float16 or bfloat16 -> float32."""
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        result = bits.to(tl.float32, bitcast=True)
    else:
        result = x.to(tl.float32)
    return result


@triton.jit
def from_float32(x, dtype: tl.constexpr):
    """float32 -> dtype (float32, float16 or bfloat16), to nearest, ties to even."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000  # rounding could carry a NaN into infinity
        rounded = tl.where(is_nan, 0x7FC0, rounded)
        result = rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def e8m0_to_float(byte):
    """int32 e8m0 byte -> float32: 2^(byte - 127); 0 is the subnormal 2^-127, 255 is NaN."""
    bits = tl.where(byte == 0, 0x00400000, byte << 23)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def round_to_even(x):
    """float32 of magnitude below 2^22 -> the nearest whole number, ties to even."""
    return (x + 12582912.0) - 12582912.0


# --- quantize --------------------------------------------------------------------------------


@triton.jit
def _mx_scale(block_max_bits, CODE: tl.constexpr):
    """The e8m0 byte (int32) of blocks whose largest magnitudes have these float32 bits."""
    exponent = block_max_bits >> 23
    mantissa = block_max_bits & 0x7FFFFF
    byte = exponent - max_exponent(CODE)
    if scale_mode(CODE) == "rceil":
        byte += (mantissa > max_mantissa(CODE)).to(tl.int32)
    if scale_mode(CODE) == "even":
        byte += (mantissa >= even_mantissa(CODE)).to(tl.int32)
    return tl.where(exponent == 255, 255, tl.maximum(byte, 0))


@triton.jit
def _divide(x, factor):
    """x float32 [R, G, S] by factor [R, G], rounded as IEEE has it."""
    divisor, x = tl.broadcast(factor[:, :, None], x)
    return tl.div_rn(x, divisor)


@triton.jit
def _push(y, CODE: tl.constexpr):
    """Of |y|: the exponent that its rounding goes by, the power of two added for it, the sum."""
    magnitude_bits = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    exponent = tl.maximum(magnitude_bits >> 23, 127 + min_exponent(CODE))
    push = ((exponent + (23 - mantissa_bits(CODE))) << 23).to(tl.float32, bitcast=True)
    return exponent, push, magnitude_bits.to(tl.float32, bitcast=True) + push


@triton.jit
def _encode_minifloat(y, CODE: tl.constexpr):
    """y float32 -> codes int32; those of NaN mean nothing."""
    exponent, push, pushed = _push(y, CODE)
    # The mantissa with its leading one carries into the exponent field, as in the reference.
    mantissa = pushed.to(tl.int32, bitcast=True) - push.to(tl.int32, bitcast=True)
    field = exponent - (127 + min_exponent(CODE))
    magnitude = tl.minimum((field << mantissa_bits(CODE)) + mantissa, max_code(CODE))
    sign = (y.to(tl.int32, bitcast=True) >> 31) & 1
    return magnitude | (sign << (code_bits(CODE) - 1))


@triton.jit
def _round_minifloat(y, factor, CODE: tl.constexpr):
    """What decoding the codes of y would give, times factor, without making them."""
    _, push, pushed = _push(y, CODE)
    values = tl.minimum(pushed - push, max_value(CODE)) * factor
    sign = y.to(tl.int32, bitcast=True) & -0x80000000
    return (values.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _nv_scale(block_max_bits, divisor, CODE: tl.constexpr):
    """The e4m3 byte (int32) of blocks of these largest magnitudes, for a tensor's scale."""
    block_max = block_max_bits.to(tl.float32, bitcast=True)
    wanted = tl.div_rn(block_max, tl.full(block_max.shape, max_value(CODE), tl.float32)) * divisor
    byte = tl.maximum(_encode_minifloat(wanted, E4M3), 1)
    return tl.where(block_max_bits >= 0x7F800000, 0x7F, byte)


@triton.jit
def _scaled(x, base, CODE: tl.constexpr):
    """x float32 [R, G, S], base float32 [R, 1] -> the stored scale and what it stands for [R, G],
    and x divided by that. Of scales that follow from magnitudes; a NaN scale makes NaN.
    """
    block_max_bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)
    if scale_kind(CODE) == "e8m0":
        scale = _mx_scale(block_max_bits, CODE)
        factor = scale_value(scale, CODE)
        # Exact, or of a number that becomes zero; a NaN scale is seen to where codes are made.
        inverse_bits = tl.maximum((254 - tl.minimum(scale, 254)) << 23, 0x00400000)
        y = x * inverse_bits.to(tl.float32, bitcast=True)[:, :, None]
        if unit(CODE) != 1.0:
            y *= 1.0 / unit(CODE)
    elif scale_kind(CODE) == "e4m3":
        scale = _nv_scale(block_max_bits, base, CODE)
        value, divisor = tl.broadcast(scale_value(scale, CODE), base)
        factor = tl.div_rn(value, divisor)
        y = _divide(x, factor)
    else:
        scale, _ = tl.broadcast(base, block_max_bits)
        factor = scale
        y = _divide(x, factor)
    return scale, factor, y


@triton.jit
def _round_signed(y, CODE: tl.constexpr):
    """y float32 -> codes as float32 of integers counted from their middle; of NaN, they are 0."""
    top: tl.constexpr = (1 << code_bits(CODE)) - 1
    codes = round_to_even(y) + (1 << (code_bits(CODE) - 1))
    return tl.where(y == y, tl.minimum(tl.maximum(codes, 0.0), top), 0.0)


@triton.jit
def _round_int(x, CODE: tl.constexpr):
    """x float32 [R, G, S] -> codes as float32 [R, G, S]; scale and offset float32 [R, G], and
    whether the group is finite.
    """
    top: tl.constexpr = (1 << code_bits(CODE)) - 1
    half: tl.constexpr = 1 << (code_bits(CODE) - 1)
    smallest: tl.constexpr = min_int_scale()
    largest_bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)
    finite = largest_bits < 0x7F800000
    x = tl.where(finite[:, :, None], x, 0.0)
    low = tl.minimum(tl.min(x, axis=2), 0.0)
    high = tl.maximum(tl.max(x, axis=2), 0.0)
    if is_symmetric(CODE):
        scale = tl.where(high < -low, -low, -high) * (1.0 / half)
        scale = scale.to(tl.float16).to(tl.float32)
        scale = tl.where(scale < 0, tl.minimum(scale, -smallest), tl.maximum(scale, smallest))
        offset = tl.full(scale.shape, half, tl.float32)
    else:
        # high - low may overflow to infinity, which the test for a finite scale then catches.
        scale = tl.div_rn(high - low, tl.full(high.shape, top, tl.float32))
        scale = tl.maximum(scale.to(tl.float16).to(tl.float32), smallest)
        offset = tl.minimum(round_to_even(tl.div_rn(-low, scale)), top)
    finite = finite & ((scale.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000)
    codes = round_to_even(_divide(x, scale)) + offset[:, :, None]
    codes = tl.minimum(tl.maximum(codes, 0.0), top)
    return codes, tl.where(finite, scale, float("nan")), offset, finite


@triton.jit
def _quantize_int(x, CODE: tl.constexpr):
    """x float32 [R, G, S] -> codes int32 [R, G, S], scale float32, zero point int32 [R, G]."""
    codes, scale, offset, finite = _round_int(x, CODE)
    codes = tl.where(finite[:, :, None], codes.to(tl.int32), 0)
    return codes, scale, tl.where(finite, offset.to(tl.int32), 0)


@triton.jit
def quantize(x, base, CODE: tl.constexpr):
    """x float32 [R, G, S], base float32 [R, 1] -> codes int32 [R, G, S], stored scale and zero
    point [R, G].

    The stored scale is a byte as int32, a float32 that float16 holds exactly, or a float32. The
    zero point is int32; formats without one get the offset that belongs to symmetric integers,
    or zeros.
    """
    if scale_kind(CODE) == "float16":
        codes, scale, zero_point = _quantize_int(x, CODE)
    else:
        scale, factor, y = _scaled(x, base, CODE)
        if is_float(CODE):
            codes = _encode_minifloat(y, CODE)
        else:
            codes = _round_signed(y, CODE).to(tl.int32)
        codes = tl.where((factor == factor)[:, :, None], codes, 0)
        zero_point = tl.zeros(scale.shape, tl.int32)
    return codes, scale, zero_point


# --- dequantize ------------------------------------------------------------------------------


@triton.jit
def scale_value(scale, CODE: tl.constexpr):
    """The stored scale (a byte of any integer type, or a float) as float32."""
    if scale_kind(CODE) == "e8m0":
        value = e8m0_to_float(scale.to(tl.int32))
        if unit(CODE) != 1.0:
            value *= unit(CODE)
    elif scale_kind(CODE) == "e4m3":
        value = decode_minifloat(scale.to(tl.int32), E4M3)
    else:
        value = scale.to(tl.float32)
    return value


@triton.jit
def decode_minifloat(codes, CODE: tl.constexpr):
    """codes int32 -> values, float32."""
    magnitude = codes & ((1 << (code_bits(CODE) - 1)) - 1)
    sign = (codes >> (code_bits(CODE) - 1)) << 31
    bits = (magnitude << (23 - mantissa_bits(CODE))) | sign
    # Subnormal elements become subnormal floats, and the factor makes both kinds right.
    value = bits.to(tl.float32, bitcast=True) * decode_factor(CODE)
    if has_nan(CODE):
        value = tl.where(magnitude > max_code(CODE), float("nan"), value)
    return value


@triton.jit
def decode(codes, zero_point, CODE: tl.constexpr):
    """codes int32, zero point int32 of a shape that broadcasts -> unscaled values, float32.

    The zero point is read by asymmetric formats only.
    """
    if is_float(CODE):
        value = decode_minifloat(codes, CODE)
    elif is_symmetric(CODE):
        value = (codes - (1 << (code_bits(CODE) - 1))).to(tl.float32)
    else:
        value = (codes - zero_point).to(tl.float32)
    return value


@triton.jit
def fake_quantize(x, base, CODE: tl.constexpr):
    """x float32 [R, G, S], base float32 [R, 1] -> its round trip through codes, float32; of floats
    no code is made.
    """
    if scale_kind(CODE) == "float16":
        codes, scale, offset, _ = _round_int(x, CODE)
        values = (codes - offset[:, :, None]) * scale[:, :, None]
    else:
        _, factor, y = _scaled(x, base, CODE)
        if is_float(CODE):
            values = _round_minifloat(y, factor[:, :, None], CODE)
        else:
            offset: tl.constexpr = 1 << (code_bits(CODE) - 1)
            values = (_round_signed(y, CODE) - offset) * factor[:, :, None]
    return values


# --- packed codes ----------------------------------------------------------------------------


@triton.jit
def pack_bits(codes, BITS: tl.constexpr):
    """codes int32 [R, C] -> bytes uint8 [R, C * BITS / 8], the first code in the lowest bits."""
    per_byte: tl.constexpr = 8 // BITS
    split = tl.reshape(codes, (codes.shape[0], codes.shape[1] // per_byte, per_byte))
    shifts = tl.arange(0, per_byte) * BITS
    return tl.sum(split << shifts[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def unpack_bits(packed, BITS: tl.constexpr):
    """Inverse of pack_bits: uint8 [R, B] -> int32 [R, B * 8 / BITS]."""
    per_byte: tl.constexpr = 8 // BITS
    shifts = tl.arange(0, per_byte) * BITS
    split = (packed.to(tl.int32)[:, :, None] >> shifts[None, None, :]) & ((1 << BITS) - 1)
    return tl.reshape(split, (packed.shape[0], packed.shape[1] * per_byte))
