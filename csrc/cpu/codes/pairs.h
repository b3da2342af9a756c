// Pairs of vectors: how elements of every dtype are read as float32, and written back.
#pragma once

#include "cpu/simd/simd.h"

namespace mixbits {
namespace MB_ISA {

// kPair consecutive columns in float32. Of bfloat16, `a` has the even columns and `b` the odd
// ones, which takes a shift and a mask where keeping the order takes shuffles; of other dtypes,
// `a` has the first half. Every group is a whole number of pairs.
struct Pair {
  vf a, b;
};
constexpr int kPair = 2 * kLanes;

// Every second lane of two vectors, beginning with lane `odd`; the inverse, for half 0 or 1.
template <class V>
MB_INLINE V every_second(V a, V b, int odd) {
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = 2 * i + odd;
  return __builtin_shuffle(a, b, lane);
}
template <class V>
MB_INLINE V alternate(V even, V odd, int half) {
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = (i + half * kLanes) / 2 + i % 2 * kLanes;
  return __builtin_shuffle(even, odd, lane);
}

template <int DTYPE>
MB_INLINE Pair load_pair(const char* p) {
  if (DTYPE == kBFloat16) {
    const vi words = load_raw<vi>(p);
    return {bit_cast<vf>(vi(words << 16)), bit_cast<vf>(vi(words & int32_t(0xffff0000)))};
  }
  constexpr int half = kLanes * dtype_bytes(DTYPE);
  if (DTYPE == kFloat32) return {load_raw<vf>(p), load_raw<vf>(p + half)};
  return {to_float(load_raw<vh>(p), DTYPE), to_float(load_raw<vh>(p + half), DTYPE)};
}

// Always the even and the odd columns.
template <int DTYPE>
MB_INLINE Pair load_even_odd(const char* p) {
  const Pair x = load_pair<DTYPE>(p);
  if (DTYPE == kBFloat16) return x;
  return {every_second(x.a, x.b, 0), every_second(x.a, x.b, 1)};
}

// Where STREAM, past the caches: `p` is then aligned to the vector, and a fence has to follow.
template <bool STREAM>
MB_INLINE void put(char* p, vi v) {
#if defined(__AVX512F__)
  if (STREAM) return _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX2__)
  if (STREAM) return _mm256_stream_si256((__m256i*)p, (__m256i)v);
#endif
  store_raw(p, v);
}

// Bits of bfloat16 in the upper half of each lane, rounded to nearest even. A NaN stays one if
// its lower 16 bits are 0, which holds for those of bfloat16 tensors and of our scales.
MB_INLINE vi round_to_upper_half(vf x) {
  const vi bits = bit_cast<vi>(x);
  return wrapping_add(bits, 0x7fff + ((bits >> 16) & 1));
}

// EXACT says that the values are bfloat16 numbers already.
template <int DTYPE, bool EXACT, bool STREAM>
MB_INLINE void store_pair(char* p, Pair x) {
  constexpr int half = kLanes * dtype_bytes(DTYPE);
  if (DTYPE == kBFloat16) {
    const vi even = EXACT ? bit_cast<vi>(x.a) : round_to_upper_half(x.a);
    const vi odd = EXACT ? bit_cast<vi>(x.b) : round_to_upper_half(x.b);
    put<STREAM>(p, ((even >> 16) & 0xffff) | (odd & int32_t(0xffff0000)));
  } else if (DTYPE == kFloat32) {
    put<STREAM>(p, bit_cast<vi>(x.a));
    put<STREAM>(p + half, bit_cast<vi>(x.b));
  } else {
    struct Halves {
      vh a, b;
    } halves = {from_float(x.a, DTYPE), from_float(x.b, DTYPE)};
    put<STREAM>(p, bit_cast<vi>(halves));
  }
}

}  // namespace MB_ISA
}  // namespace mixbits
