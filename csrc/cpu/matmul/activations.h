// Activations as integers: 32 consecutive values become integers with one scale.
//
//   e2m1 codes    twice the value, at most 12              exact: what the format says
//   MXINT8 codes  64 times the value, at most 128          likewise
//   int8          scale max / 127                          rounds: opt-in
//   int16         power-of-two scale, at most 32639        15 bits below the block's largest value
//   int24         likewise, at most 8355711                23 bits
//
// int16 and int24 go into signed bytes, the highest first: v = (byte0 * 256 + byte1) * 256 + ...;
// the bounds above are the largest that fit. int24 is for float32.
//
// One scale serves 32 values of about one size: the digits that rounding takes from the small ones
// do not count beside the large ones. They do where few are large and a weight ignores just those,
// as with the massive activations of language models: beside 1e4 the step of an int16 is 1/2. What
// rounding left is then rounded again, on a scale of its own, and x is a sum of two terms or more.
// A block needs another term unless it lost nothing, or more than half of its values are so many
// steps large that they keep the digits of their dtype:
//
//             steps          of the model's activations that need a second term
//   bfloat16  2^7            8 bits are exact from here on; 1 block in 1000
//   float16   2^9            2 in 100
//   float32   2^17           3 in 100
//   int8      4              4 in 100
//
// The model is SmolLM2-135M, the blocks those of all inputs of its linears.
#pragma once

#include "matmul.h"

#if defined(__AVX2__)
namespace mixbits {
namespace MB_ISA {

enum Integers { kE2M1Codes, kMXInt8Codes, kInt8Values, kInt16Values, kInt24Values };

constexpr int pieces_of(Integers kind) {
  return kind == kInt16Values ? 2 : kind == kInt24Values ? 3 : 1;
}

// The integers that stand for activations of this dtype beside integer weights.
static inline Integers integers_for(const SegmentWeight& segment, int dtype,
                                    bool int8_activations) {
  if (segment.activation_code)
    return segment.activation.element == kE2M1 ? kE2M1Codes : kMXInt8Codes;
  if (int8_activations) return kInt8Values;
  return dtype == kFloat32 ? kInt24Values : kInt16Values;
}

// Whether scales are float16, as those of integers that may have zero points.
constexpr bool has_float16_scales(int element) {
  return !is_float(element) && !is_mx(element) && !has_row_scale(element);
}

// Whether a weight's codes are small integers, with scales of groups: those, or twice the values of
// e2m1, or 8 times those of e2m3.
constexpr bool has_integer_codes(int element) {
  return element != kE4M3 && element != kE5M2 && !has_row_scale(element);
}

// What such integers count.
constexpr float integer_unit(int element) {
  return element == kE2M3 ? 0.125f : is_float(element) ? 0.5f : unit_of(element);
}

// Whether activations are left alone, or are codes that are small integers.
static inline bool has_integer_activations(const SegmentWeight& segment) {
  const int element = segment.activation.element;
  return !segment.activation_code || element == kE2M1 || element == kMXInt8;
}

// What weights, as unsigned bytes, are above their values; zero points are another matter.
constexpr int code_offset(int element) {
  return element == kE2M3 ? 60 : is_float(element) ? 12 : 1 << (element_bits(element) - 1);
}

// The largest of these bytes.
constexpr int largest_integer(int element) {
  return is_float(element) ? 2 * code_offset(element) : (1 << element_bits(element)) - 1;
}

// Whether the values of an MX block with this scale are finite in the dtype of x, and in
// float32 with room to spare. Where not, x must be rounded to its dtype, which the float path
// does. At the lower end nothing is lost: below the dtype's smallest number, x is on the grid.
static inline bool is_exact(int byte, int dtype) {
  return byte <= (dtype == kFloat16 ? 127 + 13 : 250);
}

// What integers are of a block: enough; a term, to which another must be added; or nothing, because
// the block is beyond their scales.
enum Fit { kEnough, kTerm, kUnfit };

// The least integer, in steps, that keeps the digits of its value.
constexpr int least_steps(Integers kind, int dtype) {
  return kind == kInt8Values    ? 4
         : kind == kInt24Values ? 1 << 17
         : dtype == kFloat16    ? 1 << 9
                                : 1 << 7;
}

// x -> integers, in steps of `scale`. Of a term, x keeps what it leaves, which is exact where
// `scale` is a power of two.
MB_INLINE Fit round_block(float* x, float scale, float reciprocal, int steps, int32_t* out) {
  const int32_t least = bit_cast<int32_t>(scale * float(steps));
  vi large = {}, left = {};
  vf rest[kBlock / kLanes];
  for (int i = 0; i < kBlock; i += kLanes) {
    const vf value = load(x + i);
    const vi rounded = round_to_int(value * reciprocal);
    store_raw(out + i, rounded);
    rest[i / kLanes] = fma(int_to_float(rounded), splat(-scale), value);
    left |= bit_cast<vi>(rest[i / kLanes]);
    large -= (bit_cast<vi>(value) & 0x7fffffff) >= least;
  }
  if (max_lane(left & 0x7fffffff) == 0 || sum_lanes(int_to_float(large)) > kBlock / 2)
    return kEnough;
  for (int i = 0; i < kBlock; i += kLanes) store(x + i, rest[i / kLanes]);
  return kTerm;
}

// Of e2m1 twice the values, of MXINT8 its integers.
template <int ELEMENT>
MB_INLINE Fit mx_block(float* x, const Format format, int dtype, int32_t* out, float* scale) {
  constexpr float unit = ELEMENT == kE2M1 ? 0.5f : kMXInt8Unit;
  const int byte = mx_scale(largest_magnitude(x, kBlock), ELEMENT, format.scale_mode);
  *scale = unit * e8m0_to_float(byte);
  if (byte == kNanScale) {
    memset(out, 0, kBlock * sizeof(int32_t));
    return kEnough;
  }
  const float reciprocal = e8m0_reciprocal(byte);
  for (int i = 0; i < kBlock; i += kLanes) {
    vf value = load(x + i) * reciprocal;
    if (ELEMENT == kE2M1) value = minifloat_round<vf, vi>(value, minifloat(kE2M1));
    const vf steps = value * (1 / unit), low = splat(-128.0f), high = splat(127.0f);
    const vf floored = steps > low ? steps : low;
    store_raw(out + i, round_to_int(floored < high ? floored : high));
  }
  return is_exact(byte, dtype) ? kEnough : kUnfit;
}

// Integers and scale of 32 values. Of a term, x keeps what others must add. Unfit, and zeros, when
// they are not finite, or too small for a scale.
MB_INLINE Fit integer_block(float* x, Integers kind, const Format format, int dtype, int32_t* out,
                            float* scale) {
  if (kind == kE2M1Codes) return mx_block<kE2M1>(x, format, dtype, out, scale);
  if (kind == kMXInt8Codes) return mx_block<kMXInt8>(x, format, dtype, out, scale);
  const int32_t top = largest_magnitude(x, kBlock);
  // The exponent of the power of two above which the largest value lies, or just below it where
  // it is nearly the next power: what then exceeds the bytes' range.
  const int exponent = (top >> 23) + ((top & 0x7fffff) >= 0x7e0000);
  if (exponent < 64 || exponent >= 254) {
    memset(out, 0, kBlock * sizeof(int32_t));
    *scale = 0.0f;
    return top == 0 ? kEnough : kUnfit;
  }
  const int steps = least_steps(kind, dtype);
  if (kind == kInt8Values) {
    const float largest = bit_cast<float>(top);
    *scale = largest / 127.0f;
    return round_block(x, *scale, 127.0f / largest, steps, out);
  }
  const int digits = kind == kInt16Values ? 14 : 22;
  *scale = bit_cast<float>((exponent - digits) << 23);
  return round_block(x, *scale, bit_cast<float>((254 - exponent + digits) << 23), steps, out);
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
