// What a model does to a token between its linears, on rows of float32 that are filled up with
// zeros to whole vectors.
//
// Every operation rounds where torch does when it runs the same model in `dtype`: what a row
// holds is always a number of that dtype.
#pragma once

#include "cpu/simd/simd.h"

namespace mixbits {
namespace MB_ISA {

MB_INLINE int64_t padded_lanes(int64_t count) { return round_up(count, kLanes); }

MB_INLINE vf round_as(vf v, int dtype) {
  return dtype == kFloat32 ? v : to_float(from_float(v, dtype), dtype);
}

// e^x within two units in the last place, 0 and infinity included.
//
// x = n ln 2 + r, |r| <= ln(2) / 2, where the series for e^r is cut off at a tenth of a unit. 2^n
// comes in two factors, as one may be beyond float32's exponents.
MB_INLINE vf exponential(vf x) {
  const vf low = splat(-104.0f), high = splat(89.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const vf magic = splat(0x1.8p23f);
  const vf shifted = fma(x, splat(1.44269504f), magic), n = shifted - magic;
  vf r = fma(n, splat(-0x1.63p-1f), x);   // the first digits of ln 2: the product is exact
  r = fma(n, splat(0x1.bd0106p-13f), r);  // what they are above it
  constexpr float factors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  vf sum = splat(1.0f / 5040);
  for (int i = 0; i < 7; ++i) sum = fma(sum, r, splat(factors[i]));
  const vi power = bit_cast<vi>(shifted) - bit_cast<vi>(magic), half = power >> 1;
  return sum * bit_cast<vf>(vi((half + 127) << 23)) * bit_cast<vf>(vi((power - half + 127) << 23));
}

// x += y, a row of `dtype`.
static inline void add_row(float* x, const float* y, int64_t count, int dtype) {
  for (int64_t i = 0; i < count; i += kLanes)
    store(x + i, round_as(load(x + i) + load(y + i), dtype));
}

// out = x / sqrt(mean(x^2) + eps) * weight; `out` may be x.
static inline void rms_norm(const float* x, const float* weight, int64_t count, float eps,
                            int dtype, float* out) {
  vf squares = {};
  for (int64_t i = 0; i < count; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
  const vf scale = splat(1.0f / __builtin_sqrtf(sum_lanes(squares) / float(count) + eps));
  for (int64_t i = 0; i < count; i += kLanes)
    store(out + i, round_as(round_as(load(x + i) * scale, dtype) * load(weight + i), dtype));
}

// gate = gate / (1 + e^-gate) * up
static inline void silu_times(float* gate, const float* up, int64_t count, int dtype) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const vf x = load(gate + i), silu = round_as(x / (1.0f + exponential(-x)), dtype);
    store(gate + i, round_as(silu * load(up + i), dtype));
  }
}

// Turns the pairs (x[i], x[i + count / 2]) by the angles whose cos and sin are given. `other` is a
// buffer for a row.
static inline void rotate_row(float* x, const float* cos, const float* sin, int64_t count,
                              int dtype, float* other) {
  const int64_t half = count / 2;
  for (int64_t i = 0; i < half; ++i) {
    other[i] = -x[half + i];
    other[half + i] = x[i];
  }
  for (int64_t i = count; i < padded_lanes(count); ++i) other[i] = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const vf a = round_as(load(x + i) * load(cos + i), dtype);
    const vf b = round_as(load(other + i) * load(sin + i), dtype);
    store(x + i, round_as(a + b, dtype));
  }
}

}  // namespace MB_ISA
}  // namespace mixbits
