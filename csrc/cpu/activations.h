// Activations as integers: 32 consecutive values become integers with one scale.
//
//   e2m1 codes    twice the value, at most 12              exact: what the format says
//   int8          scale max / 127                          rounds: opt-in
//   int16         power-of-two scale, at most 32639        15 bits below the block's largest value
//   int24         likewise, at most 8355711                23 bits
//
// int16 and int24 go into signed bytes, the highest first: v = (byte0 * 256 + byte1) * 256 + ...;
// the bounds above are the largest that fit. Values of 8 significant bits (bfloat16) within 2^-7
// of the largest are exact in int16, and what is rounded is beyond the last bit of a bfloat16 or
// float16 result. int24 is for float32.
#pragma once

#include "matmul.h"

#if defined(__AVX2__)
namespace mixbits {
namespace MB_ISA {

enum Integers { kE2M1Codes, kInt8Values, kInt16Values, kInt24Values };

constexpr int pieces_of(Integers kind) {
  return kind == kInt16Values ? 2 : kind == kInt24Values ? 3 : 1;
}

// The integers that stand for activations of this dtype beside integer weights.
static inline Integers integers_for(const Target& target, int dtype, bool int8_activations) {
  if (target.activation_code) return kE2M1Codes;
  if (int8_activations) return kInt8Values;
  return dtype == kFloat32 ? kInt24Values : kInt16Values;
}

// Whether a weight's codes are small integers (twice the values of e2m1).
static inline bool has_integer_codes(const Target& target) {
  return target.element() == kE2M1 || !is_mx(target.element());
}

// Whether activations are left alone, or are codes of e2m1.
static inline bool has_integer_activations(const Target& target) {
  return !target.activation_code || target.activation.element == kE2M1;
}

// What weights, as unsigned bytes, are above their values; zero points are another matter.
static inline int code_offset(int element) {
  return element == kE2M1 ? 12 : 1 << (element_bits(element) - 1);
}

// Whether the values of an e2m1 block with this scale are finite in the dtype of x, and in
// float32 with room to spare. Where not, x must be rounded to its dtype, which the float path
// does. At the lower end nothing is lost: below the dtype's smallest number, x is on the grid.
static inline bool is_exact(int byte, int dtype) {
  return byte <= (dtype == kFloat16 ? 127 + 13 : 250);
}

MB_INLINE void round_block(const float* x, float reciprocal, int32_t* out) {
  for (int i = 0; i < kBlock; i += kLanes) {
    store_raw(out + i, round_to_int(load(x + i) * reciprocal));
  }
}

MB_INLINE bool e2m1_block(const float* x, const Format format, int dtype, int32_t* out,
                          float* scale) {
  const int byte = mx_scale(largest_magnitude(x, kBlock), kE2M1, format.scale_mode);
  *scale = 0.5f * e8m0_to_float(byte);
  if (byte == kNanScale) {
    memset(out, 0, kBlock * sizeof(int32_t));
    return true;
  }
  const float reciprocal = e8m0_reciprocal(byte);
  for (int i = 0; i < kBlock; i += kLanes) {
    const vf rounded = minifloat_round<vf, vi>(load(x + i) * reciprocal, minifloat(kE2M1));
    store_raw(out + i, round_to_int(rounded + rounded));
  }
  return is_exact(byte, dtype);
}

// Integers and scale of 32 values; false, and zeros, when they are not finite, or too small for a
// scale.
MB_INLINE bool integer_block(const float* x, Integers kind, const Format format, int dtype,
                             int32_t* out, float* scale) {
  if (kind == kE2M1Codes) return e2m1_block(x, format, dtype, out, scale);
  const int32_t top = largest_magnitude(x, kBlock);
  // The exponent of the power of two above which the largest value lies, or just below it where
  // it is nearly the next power: what then exceeds the bytes' range.
  const int exponent = (top >> 23) + ((top & 0x7fffff) >= 0x7e0000);
  if (exponent < 64 || exponent >= 254) {
    memset(out, 0, kBlock * sizeof(int32_t));
    *scale = 0.0f;
    return top == 0;
  }
  if (kind == kInt8Values) {
    const float largest = bit_cast<float>(top);
    *scale = largest / 127.0f;
    round_block(x, 127.0f / largest, out);
    return true;
  }
  const int digits = kind == kInt16Values ? 14 : 22;
  *scale = bit_cast<float>((exponent - digits) << 23);
  round_block(x, bit_cast<float>((254 - exponent + digits) << 23), out);
  return true;
}

// Integers -> signed bytes, out[piece * stride + i], the highest piece first.
template <int PIECES>
MB_INLINE void split_pieces(const int32_t* values, int64_t stride, int8_t* out) {
  for (int i = 0; i < kBlock; i += kLanes) {
    vi rest = load_raw<vi>(values + i);
    for (int piece = PIECES - 1; piece >= 0; --piece) {
      const vi low = piece == 0 ? rest : vi((rest << 24) >> 24);
      store_raw(out + piece * stride + i, narrow_to_bytes(low & 0xff));
      rest = (rest - low) >> 8;
    }
  }
}

}  // namespace MB_ISA
}  // namespace mixbits
#endif
