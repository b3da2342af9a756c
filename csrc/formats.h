// The numerics of every number format, once, for CPU and CUDA.
//
// A group of consecutive columns has one scale, every element one code:
//
//   element   code                                      scale      value
//   e2m1      sign, 2 bits exponent, 1 bit mantissa     e8m0       decode(code) * 2^(scale - 127)
//   e2m3      sign, 2, 3 (largest 7.5)                  e8m0       likewise
//   e4m3      sign, 4, 3 (largest 448, no infinity)     e8m0       likewise
//   e5m2      sign, 5, 2 (largest 57344)                e8m0       likewise
//   e2m1      the same                                  e4m3       decode(code) * (scale / divisor)
//   e4m3      the same                                  float32    decode(code) * scale
//   int8      symmetric, offset binary                  float32    (code - 128) * scale
//   int8      symmetric, offset binary                  e8m0       (code - 128) / 64 * 2^(..)
//   intB      symmetric, offset binary                  float16    (code - 2^(B-1)) * scale
//   intB      asymmetric                                float16    (code - zero_point) * scale
//
// Everything here equals mixbits/formats/reference.py bit for bit. The element functions are
// templates over <F, I>: F is float and I int32_t in a CUDA thread, or GCC vectors of them on the
// CPU, so that both run the same arithmetic. They use integers where a float operation could meet a
// subnormal, and round by adding and subtracting a constant ("magic"): round-to-nearest-even is
// what the adder does, and no library call is needed. That requires -ffp-contract=off or code
// that leaves nothing to contract, and never -ffast-math.
//
// Functions are static: a copy compiled for one instruction set must never be linked into
// another's code.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define MB_HD __host__ __device__
#else
#define MB_HD
#endif

namespace mixbits {

// Order of mixbits.formats.schemes.ELEMENTS, SCALE_MODES.
enum Element : int {
  kE2M1 = 0,
  kE4M3 = 1,
  kE5M2 = 2,
  kInt2 = 3,
  kInt4 = 4,
  kInt8 = 5,
  kE2M3 = 6,
  kInt3 = 7,
  kInt5 = 8,
  kInt6 = 9,
  // With other scales they are other elements here: bits 13-14 of a format's code tell.
  kMXInt8 = 0x40 | kInt8,   // e8m0
  kNVE2M1 = 0x40 | kE2M1,   // e4m3, and one divisor for the whole tensor, or for a row
  kRowE4M3 = 0x40 | kE4M3,  // float32, one for a row
  kRowInt8 = 0x80 | kInt8,  // likewise
};
enum ScaleMode : int { kFloor = 0, kRceil = 1, kEven = 2 };
// The number under which Python passes a tensor's dtype.
enum Dtype : int { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

// mixbits.formats.schemes.Format.code: bits 0-7 element, 8-11 scale mode, 12 symmetric, 13-14 scale
// (0 e8m0, 1 float16, 2 e4m3, 3 float32), 15 a tensor's scale per row, 16.. group_size.
struct Format {
  int element;
  int scale_mode;
  bool symmetric;
  int group_size;  // where a row has one scale: how many of its columns are taken at a time
  bool per_row;    // of kNVE2M1: whether a divisor is of a row, and not of the whole tensor
};

constexpr int kRowColumns = 128;
MB_HD static inline constexpr bool has_row_scale(int element) {
  return element == kRowE4M3 || element == kRowInt8;
}
MB_HD static inline constexpr int scaled_element(int element, int scale) {
  return scale == 0 && element == kInt8 ? kMXInt8
         : scale == 2                   ? kNVE2M1
         : scale == 3                   ? (element == kInt8 ? kRowInt8 : kRowE4M3)
                                        : element;
}
MB_HD static inline constexpr Format decode_format(int code) {
  const int element = scaled_element(code & 0xff, code >> 13 & 3);
  return Format{element, (code >> 8) & 0xf, ((code >> 12) & 1) != 0,
                has_row_scale(element) ? kRowColumns : code >> 16, ((code >> 15) & 1) != 0};
}
MB_HD static inline constexpr bool is_float(int element) {
  return element <= kE5M2 || element == kE2M3 || element == kNVE2M1 || element == kRowE4M3;
}
// Whether scales follow from the largest magnitude of a whole row or tensor.
MB_HD static inline constexpr bool has_span(int element) {
  return element == kNVE2M1 || has_row_scale(element);
}
// Whether scales are e8m0.
MB_HD static inline constexpr bool is_mx(int element) {
  return element == kMXInt8 || (is_float(element) && !has_span(element));
}
MB_HD static inline constexpr int element_bits(int element) {
  return element == kE2M1 || element == kNVE2M1 || element == kInt4 ? 4
         : element == kInt2                                         ? 2
         : element == kInt3                                         ? 3
         : element == kInt5                                         ? 5
         : element == kE2M3 || element == kInt6                     ? 6
                                                                    : 8;
}

struct Minifloat {
  int bits;
  int mantissa_bits;
  int min_exponent;   // of the smallest normal number, shared by the subnormals
  int max_exponent;   // of the largest finite value
  int32_t max_value;  // the largest finite value, as the bits of a float
};
constexpr float kMXInt8Unit = 1.0f / 64;  // what its codes count

MB_HD static inline constexpr Minifloat minifloat(int element) {
  return element == kE2M1 || element == kNVE2M1 ? Minifloat{4, 1, 0, 2, 0x40c00000}  // 6
         : element == kE2M3                     ? Minifloat{6, 3, 0, 2, 0x40f00000}  // 7.5
         : element == kMXInt8 ? Minifloat{8, 6, 0, 0, 0x3ffe0000}  // 127/64; for its scales only
         : element == kE4M3 || element == kRowE4M3 ? Minifloat{8, 3, -6, 8, 0x43e00000}     // 448
                                                   : Minifloat{8, 2, -14, 15, 0x47600000};  // 57344
}

template <class To, class From>
MB_HD static inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// --- float16 and bfloat16 -------------------------------------------------------------------

MB_HD static inline float bfloat16_to_float(uint16_t h) {
  return bit_cast<float>(uint32_t(h) << 16);
}

// Round to nearest even; NaN becomes 0x7fc0.
MB_HD static inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

MB_HD static inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  uint32_t bits = (magnitude << 13) + (112u << 23);  // normal numbers
  if (magnitude >= 0x7c00) bits = 0x7f800000u | (magnitude & 0x3ff) << 13;
  if (magnitude < 0x0400) {  // subnormal: put the digits under a leading one, then remove it
    bits = bit_cast<uint32_t>(bit_cast<float>(magnitude << 13 | 113u << 23) -
                              bit_cast<float>(113u << 23));
  }
  return bit_cast<float>(bits | sign);
}

// Round to nearest even; too large becomes infinity; NaN becomes 0x7e00.
MB_HD static inline uint16_t float_to_half(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7e00;
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000u) {  // subnormal: 0.5 has the spacing of the smallest half
    return uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
  return uint16_t(sign | (rounded - (112u << 23)) >> 13);
}

// --- MX scales ------------------------------------------------------------------------------

constexpr int kNanScale = 255;  // e8m0's NaN: a block that held a NaN or an infinity

// 2^(byte - 127). Byte 0 is the subnormal 2^-127, byte 255 is NaN.
MB_HD static inline float e8m0_to_float(int byte) {
  const uint32_t special = byte == 0 || byte == kNanScale ? 0x00400000u : 0u;
  return bit_cast<float>(uint32_t(byte) << 23 | special);
}

// 2^(127 - byte), and NaN for 255. A power of two's reciprocal is exact, so multiplying by it
// equals dividing.
MB_HD static inline float e8m0_reciprocal(int byte) {
  const uint32_t subnormal = byte == 254 ? 0x00400000u : 0u;
  return bit_cast<float>(byte == kNanScale ? 0x7fc00000u : uint32_t(254 - byte) << 23 | subnormal);
}

// The e8m0 byte of a block whose largest magnitude has these float bits.
//   floor   E = e - emax              rceil   + (m > max_value * 2^E)
//   even    + (mantissa >= 1.75)      and E >= -127, stored as E + 127
// Of int8 the mantissa of `even` is that from which on 127 / 64 is nearest: 127.5 / 64.
MB_HD static inline int mx_scale(int32_t max_bits, int element, int scale_mode) {
  const Minifloat f = minifloat(element);
  const int32_t exponent = max_bits >> 23, mantissa = max_bits & 0x7fffff;
  if (exponent == 255) return kNanScale;
  int32_t byte = exponent - f.max_exponent;
  if (scale_mode == kRceil) byte += mantissa > (f.max_value & 0x7fffff);
  if (scale_mode == kEven) byte += mantissa >= (is_float(element) ? 0x600000 : 0x7f0000);
  return byte > 0 ? byte : 0;
}

// --- minifloat elements ---------------------------------------------------------------------

// y = x / scale as: its magnitude, saturated; its biased exponent, not below the element's
// smallest; and the constant whose spacing is the element's there.
template <class F, class I>
struct RoundingParts {
  F magnitude;
  I exponent;
  F magic;
};

template <class F, class I>
MB_HD static inline RoundingParts<F, I> rounding_parts(F y, const Minifloat f) {
  I bits = bit_cast<I>(y) & 0x7fffffff;
  const I largest = f.max_value - (bits & 0);
  bits = bits < largest ? bits : largest;
  const I lowest = (127 + f.min_exponent) - (bits & 0);
  I exponent = bits >> 23;
  exponent = exponent > lowest ? exponent : lowest;
  const F magic = bit_cast<F>(I((exponent + (23 - f.mantissa_bits)) << 23));
  return {bit_cast<F>(bits), exponent, magic};
}

// y rounded to the element's grid: nearest, ties to even, saturating, zeros keep their sign.
template <class F, class I>
MB_HD static inline F minifloat_round(F y, const Minifloat f) {
  const auto p = rounding_parts<F, I>(y, f);
  const F rounded = (p.magnitude + p.magic) - p.magic;
  return bit_cast<F>(I(bit_cast<I>(rounded) | (bit_cast<I>(y) & int32_t(0x80000000))));
}

// The code of y rounded to the element's grid. y may be anything but NaN.
template <class F, class I>
MB_HD static inline I minifloat_encode(F y, const Minifloat f) {
  const auto p = rounding_parts<F, I>(y, f);
  const F sum = p.magnitude + p.magic;
  const I steps = bit_cast<I>(sum) - bit_cast<I>(p.magic);
  // A normal number carries its leading one into the exponent field.
  const I magnitude = ((p.exponent - (127 + f.min_exponent)) << f.mantissa_bits) + steps;
  const I sign = (bit_cast<I>(y) >> (32 - f.bits)) & (1 << (f.bits - 1));
  return magnitude | sign;
}

// The value of a code. The codes that are NaN or infinity in e4m3 and e5m2 give NaN.
template <class F, class I>
MB_HD static inline F minifloat_decode(I code, const Minifloat f) {
  const int lowest = 127 + f.min_exponent;
  const I magnitude = code & ((1 << (f.bits - 1)) - 1);
  const I digits = magnitude << (23 - f.mantissa_bits);
  const I normal = digits + ((lowest - 1) << 23);
  // A subnormal gets a leading one to be a normal float, from which it is then subtracted.
  const F with_one = bit_cast<F>(I(digits | (lowest << 23)));
  const F subnormal = with_one - bit_cast<float>(int32_t(lowest << 23));
  I bits = magnitude < (1 << f.mantissa_bits) ? bit_cast<I>(subnormal) : normal;
  if (f.bits == 8) {
    const I nan = 0x7fc00000 - (bits & 0);
    bits = bits > f.max_value ? nan : bits;
  }
  return bit_cast<F>(I(bits | ((code << (32 - f.bits)) & int32_t(0x80000000))));
}

// --- scales of a row or a tensor --------------------------------------------------------------

constexpr float kLeastMaximum = 1.0f / (1ull << 50) / (1ull << 50);  // 2^-100
constexpr float kLargestNVScale = 448.0f;  // of those that a divisor leaves

// What a row, or a whole tensor, gives to its scales: where they are e4m3 their divisor, where they
// are float32 the scale. `largest` is a NaN where the latter is to be one.
MB_HD static inline float span_of(float largest, int element) {
  const float maximum = largest < kLeastMaximum ? kLeastMaximum : largest;
  return element == kNVE2M1    ? kLargestNVScale * 6.0f / maximum
         : element == kRowE4M3 ? maximum / 448.0f
                               : maximum / 127.5f;
}

constexpr int kNanNVScale = 0x7f;

// The e4m3 bytes of NVFP4 blocks whose largest magnitudes are `largest`, NaN where an element is
// not finite: the nearest, but not 0.
template <class F, class I>
MB_HD static inline I nv_scale(F largest, F divisor) {
  const F wanted = largest / 6.0f * divisor;
  const I byte = minifloat_encode<F, I>(wanted, minifloat(kE4M3));
  const I nan = kNanNVScale - (byte & 0), least = 1 - (byte & 0);
  const I floored = byte > least ? byte : least;
  return wanted == wanted ? floored : nan;
}

// --- integer elements -----------------------------------------------------------------------

constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: its neighbours are the integers
constexpr int32_t kRoundMagicBits = 0x4b400000;
// The same for multiples of what an element's codes count.
MB_HD static inline constexpr float unit_of(int element) {
  return element == kMXInt8 ? kMXInt8Unit : 1.0f;
}
MB_HD static inline constexpr float round_magic(int element) {
  return kRoundMagic * unit_of(element);
}
constexpr uint16_t kMinIntScale = 0x00a8;  // float16 of 1e-5, AutoRound's q_scale_thresh

// Scale and offset of an integer group. `finite` is false where the group held a NaN or an
// infinity, or where its scale is beyond float16: then scale is NaN, and codes and offset are 0.
struct IntGroup {
  float scale;
  float offset;
  uint16_t scale_half;
  bool finite;
};

// `low` <= 0 and `high` >= 0 bound the group (0 included); `finite` says whether all its
// elements are.
MB_HD static inline IntGroup int_group(float low, float high, bool finite, int bits,
                                       bool symmetric) {
  const float floor = half_to_float(kMinIntScale);
  const int top = (1 << bits) - 1, half = 1 << (bits - 1);
  float scale, offset;
  if (symmetric) {
    // The side of larger magnitude maps to the lowest code, so the scale may be negative.
    scale = half_to_float(float_to_half((high < -low ? -low : -high) / float(half)));
    if (scale < 0) {
      scale = scale < -floor ? scale : -floor;
    } else {
      scale = scale > floor ? scale : floor;
    }
    offset = float(half);
  } else {
    scale = half_to_float(float_to_half((high - low) / float(top)));
    scale = scale > floor ? scale : floor;
    offset = (-low / scale + kRoundMagic) - kRoundMagic;
    offset = offset < float(top) ? offset : float(top);
  }
  const uint16_t scale_half = float_to_half(scale);
  if (!finite || (scale_half & 0x7c00) == 0x7c00) {
    return IntGroup{bit_cast<float>(uint32_t(0x7fc00000)), 0.0f, 0x7e00, false};
  }
  return IntGroup{scale, offset, scale_half, true};
}

// The code of x as a float: round(x / scale) + offset, clamped. The division is a true one: a
// product with the reciprocal differs in ties.
template <class F>
MB_HD static inline F int_round(F x, float scale, float offset, int bits) {
  const F rounded = ((x / scale + kRoundMagic) - kRoundMagic) + offset;
  const F zero = x - x, top = zero + float((1 << bits) - 1);
  const F floored = rounded > zero ? rounded : zero;
  return floored < top ? floored : top;
}

// Integers of magnitude below 2^22, to float and back.
template <class F, class I>
MB_HD static inline I small_to_int(F x) {
  const F sum = x + kRoundMagic;
  return bit_cast<I>(sum) - kRoundMagicBits;
}
template <class F, class I>
MB_HD static inline F small_to_float(I i) {
  return bit_cast<F>(I(i + kRoundMagicBits)) - kRoundMagic;
}

}  // namespace mixbits
