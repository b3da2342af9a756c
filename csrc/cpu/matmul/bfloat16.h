// e4m3, e5m2 and bfloat16 for CPUs that multiply bfloat16 (AVX-512 BF16, and VBMI for tables).
//
// Every e4m3 and e5m2 value is a bfloat16, and the product of two bfloat16 is exact in float32,
// where vdpbf16ps adds it. It takes subnormals for zeros, so tokens whose largest value is below
// 2^-60 are left to the float path: in the others, what is lost is below 2^-60 of what counts.
#pragma once

#include "matmul.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define MB_BFLOAT16 1

namespace mixbits {
namespace MB_ISA {

// Whether float_token's values are bfloat16 numbers.
static inline bool has_bfloat16_activations(const SegmentWeight& segment, int dtype) {
  return segment.activation_code ? is_mx(segment.activation.element) : dtype == kBFloat16;
}

// Floats -> bfloat16. False when one of them is not a bfloat16, or vdpbf16ps would not do.
static inline bool narrow_to_bfloat16(const float* x, int64_t count, uint16_t* out) {
  int32_t lost = 0;
  int32_t top = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = bit_cast<int32_t>(x[i]), magnitude = bits & 0x7fffffff;
    lost |= bits & 0xffff;
    top = magnitude > top ? magnitude : top;
    out[i] = uint16_t(uint32_t(bits) >> 16);
  }
  const int exponent = top >> 23;
  return lost == 0 && (top == 0 || (exponent >= 127 - 60 && exponent <= 127 + 60));
}

// The bytes of the bfloat16 values of all magnitudes of an 8-bit minifloat.
struct ByteTables {
  __m512i high[2], low[2];
};

template <int ELEMENT>
static ByteTables byte_tables() {
  alignas(64) uint8_t high[128], low[128];
  for (int code = 0; code < 128; ++code) {
    const float value = minifloat_decode<float, int32_t>(code, minifloat(ELEMENT));
    const uint32_t bits = bit_cast<uint32_t>(value);
    high[code] = uint8_t(bits >> 24);
    low[code] = uint8_t(bits >> 16);
  }
  return {{_mm512_load_si512(high), _mm512_load_si512(high + 64)},
          {_mm512_load_si512(low), _mm512_load_si512(low + 64)}};
}

// 64 codes -> the high and low bytes of their values.
MB_INLINE void look_up_bytes(const ByteTables& tables, __m512i codes, __m512i* high, __m512i* low) {
  *low = _mm512_permutex2var_epi8(tables.low[0], codes, tables.low[1]);
  const __m512i magnitude = _mm512_permutex2var_epi8(tables.high[0], codes, tables.high[1]);
  const __m512i sign = _mm512_set1_epi8(char(0x80));
  *high = _mm512_ternarylogic_epi64(magnitude, codes, sign, 0xf8);  // magnitude | (codes & sign)
}

MB_INLINE __m512 dot_bfloat16(__m512 acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}

}  // namespace MB_ISA
}  // namespace mixbits
#endif
