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

Integers need a true IEEE division: multiplying by a reciprocal moves ties.

bfloat16 is converted by hand on its bits, in both directions. It is the same result as the
hardware's conversion, and it is also right in the interpreter, whose own conversion truncates
and breaks subnormals. Everything else is float32.
"""

import triton
import triton.language as tl
from mixbits.formats.reference import MIN_INT_SCALE
from mixbits.formats.schemes import ELEMENTS, INTEGERS, MINIFLOATS, SCALE_MODES, Format

TILE_COLUMNS = 128  # a multiple of every group size, and of a slab


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
def group_size(code):
    return code >> 16


@triton.constexpr_function
def code_bits(code):
    name = ELEMENTS[code & 0xFF]
    return MINIFLOATS[name].bits if name in MINIFLOATS else INTEGERS[name]


@triton.constexpr_function
def mantissa_bits(code):
    return MINIFLOATS[ELEMENTS[code & 0xFF]].mantissa_bits


@triton.constexpr_function
def min_exponent(code):
    return MINIFLOATS[ELEMENTS[code & 0xFF]].min_exponent


@triton.constexpr_function
def max_exponent(code):
    return MINIFLOATS[ELEMENTS[code & 0xFF]].max_exponent


@triton.constexpr_function
def max_mantissa(code):
    """The largest value's fraction as the 23 mantissa bits of a float32."""
    element = MINIFLOATS[ELEMENTS[code & 0xFF]]
    return int((element.max_value / 2.0**element.max_exponent - 1.0) * 2**23)


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
    """Columns of one tile: whole groups, and whole bytes of packed zero points."""
    return max(TILE_COLUMNS, fmt.group_size * (8 // fmt.bits))


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
        byte += (mantissa >= 0x600000).to(tl.int32)
    return tl.where(exponent == 255, 255, tl.maximum(byte, 0))


@triton.jit
def _round_mx(x, CODE: tl.constexpr):
    """x float32 [R, G, S] -> e8m0 bytes int32 [R, G]; of |x| scaled down, [R, G, S]: the exponent
    that its rounding goes by, the power of two that is added for it, and the sum.
    """
    magnitude_bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    byte = _mx_scale(tl.max(magnitude_bits, axis=2), CODE)
    # A finite block has a byte of at most 253, so that the inverse scale is a normal number.
    inverse = ((254 - tl.minimum(byte, 253)) << 23).to(tl.float32, bitcast=True)
    y = magnitude_bits.to(tl.float32, bitcast=True) * inverse[:, :, None]
    exponent = tl.maximum(y.to(tl.int32, bitcast=True) >> 23, 127 + min_exponent(CODE))
    push = ((exponent + (23 - mantissa_bits(CODE))) << 23).to(tl.float32, bitcast=True)
    return byte, exponent, push, y + push


@triton.jit
def _quantize_mx(x, CODE: tl.constexpr):
    """x float32 [R, G, S] -> codes int32 [R, G, S], e8m0 bytes int32 [R, G]."""
    byte, exponent, push, pushed = _round_mx(x, CODE)
    # The mantissa with its leading one carries into the exponent field, as in the reference.
    mantissa = pushed.to(tl.int32, bitcast=True) - push.to(tl.int32, bitcast=True)
    field = exponent - (127 + min_exponent(CODE))
    magnitude = tl.minimum((field << mantissa_bits(CODE)) + mantissa, max_code(CODE))
    sign = (x.to(tl.int32, bitcast=True) >> 31) & 1
    codes = magnitude | (sign << (code_bits(CODE) - 1))
    return tl.where((byte == 255)[:, :, None], 0, codes), byte


@triton.jit
def _fake_quantize_mx(x, CODE: tl.constexpr):
    """What decoding the codes would give, without making them: float32 [R, G, S]."""
    byte, _, push, pushed = _round_mx(x, CODE)
    values = tl.minimum(pushed - push, max_value(CODE)) * e8m0_to_float(byte)[:, :, None]
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    return (values.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


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
    divisor, x = tl.broadcast(scale[:, :, None], x)
    codes = round_to_even(tl.div_rn(x, divisor)) + offset[:, :, None]
    codes = tl.minimum(tl.maximum(codes, 0.0), top)
    return codes, tl.where(finite, scale, float("nan")), offset, finite


@triton.jit
def _quantize_int(x, CODE: tl.constexpr):
    """x float32 [R, G, S] -> codes int32 [R, G, S], scale float32, zero point int32 [R, G]."""
    codes, scale, offset, finite = _round_int(x, CODE)
    codes = tl.where(finite[:, :, None], codes.to(tl.int32), 0)
    return codes, scale, tl.where(finite, offset.to(tl.int32), 0)


@triton.jit
def quantize(x, CODE: tl.constexpr):
    """x float32 [R, G, S] -> codes int32 [R, G, S], stored scale and zero point [R, G].

    The stored scale is the e8m0 byte as int32, or a float32 that float16 holds exactly. The
    zero point is int32; formats without one get the offset that belongs to symmetric integers,
    or zeros.
    """
    if is_float(CODE):
        codes, scale = _quantize_mx(x, CODE)
        zero_point = tl.zeros_like(scale)
    else:
        codes, scale, zero_point = _quantize_int(x, CODE)
    return codes, scale, zero_point


# --- dequantize ------------------------------------------------------------------------------


@triton.jit
def scale_value(scale, CODE: tl.constexpr):
    """The stored scale (e8m0 byte of any integer type, or a float) as float32."""
    return e8m0_to_float(scale.to(tl.int32)) if is_float(CODE) else scale.to(tl.float32)


@triton.jit
def decode(codes, zero_point, CODE: tl.constexpr):
    """codes int32, zero point int32 of a shape that broadcasts -> unscaled values, float32.

    The zero point is read by asymmetric formats only.
    """
    if is_float(CODE):
        magnitude = codes & ((1 << (code_bits(CODE) - 1)) - 1)
        sign = (codes >> (code_bits(CODE) - 1)) << 31
        bits = (magnitude << (23 - mantissa_bits(CODE))) | sign
        # Subnormal elements become subnormal floats, and the factor makes both kinds right.
        value = bits.to(tl.float32, bitcast=True) * decode_factor(CODE)
        if has_nan(CODE):
            value = tl.where(magnitude > max_code(CODE), float("nan"), value)
    elif is_symmetric(CODE):
        value = (codes - (1 << (code_bits(CODE) - 1))).to(tl.float32)
    else:
        value = (codes - zero_point).to(tl.float32)
    return value


@triton.jit
def fake_quantize(x, CODE: tl.constexpr):
    """x float32 [R, G, S] -> its round trip through codes, float32; no code is made."""
    if is_float(CODE):
        values = _fake_quantize_mx(x, CODE)
    else:
        codes, scale, offset, _ = _round_int(x, CODE)
        values = (codes - offset[:, :, None]) * scale[:, :, None]
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
