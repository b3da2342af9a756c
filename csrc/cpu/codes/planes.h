// Codes as bytes: the one or two planes of a packed row (csrc/layout.h), written and read.
#pragma once

#include "cpu/simd/simd.h"
#include "layout.h"

namespace mixbits {
namespace MB_ISA {

// kPair codes of BITS bits as stored in a plane: `even` and `odd` are those of even and odd
// columns.
template <int BITS>
MB_INLINE void store_plane(uint8_t* out, vi even, vi odd) {
  const vi both = even | odd << BITS;
  if (BITS == 8) return store_raw(out, narrow_to_halves(both));
  const vb bytes = narrow_to_bytes(both);
  if (BITS == 4) return store_raw(out, bytes);
  if constexpr (BITS < 4) {
    // Two codes of one or two bits at the lower end of each byte: neighbours join, then pairs.
    constexpr uint32_t pairs = BITS == 2 ? 0x00ff00ff : 0x000f000f;
    for (int i = 0; i < kLanes; i += 4) {
      uint32_t word;
      memcpy(&word, (const char*)&bytes + i, 4);
      word = (word | word >> (8 - 2 * BITS)) & pairs;
      const uint32_t joined = word | word >> (16 - 4 * BITS);
      memcpy(out + i / 4 * BITS, &joined, BITS);
    }
  }
}

// Where codes of a packed row are: in one plane or two.
struct Planes {
  uint8_t *lower, *upper;

  // From column k on, which begins at a byte in both.
  Planes at(int64_t k, int bits) const {
    const int low = lower_bits(bits);
    return {lower + k * low / 8, upper + k * (bits - low) / 8};
  }
};

template <int BITS>
MB_INLINE void store_codes(const Planes& out, vi even, vi odd) {
  constexpr int low = lower_bits(BITS), mask = (1 << low) - 1;
  store_plane<low>(out.lower, even & mask, odd & mask);
  if constexpr (low < BITS) store_plane<BITS - low>(out.upper, even >> low, odd >> low);
}

// kLanes codes of a plane from number k on, a multiple of kLanes.
template <int BITS>
MB_INLINE vi unpack_plane(const uint8_t* plane, int64_t k) {
  const uint8_t* p = plane + k * BITS / 8;
  if (BITS == 8) return widen_bytes(load_raw<vb>(p));
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
#if defined(__AVX512F__)
  if (BITS == 4) {
    int32_t words[2];
    memcpy(words, p, 8);
    const __m512i both = _mm512_mask_set1_epi32(_mm512_set1_epi32(words[0]), 0xff00, words[1]);
    return ((vi)_mm512_srlv_epi32(both, (__m512i)((lane & 7) * 4))) & 15;
  }
#endif
  int32_t word = 0;
  memcpy(&word, p, (kLanes * BITS + 7) / 8);
  if (kLanes * BITS < 8) word >>= k * BITS & 7;  // four codes of one bit
  return (splat_i(word) >> (lane * BITS)) & ((1 << BITS) - 1);
}

// kLanes codes of a row, given as its planes, from number k on, a multiple of kLanes.
template <int BITS>
MB_INLINE vi unpack(const uint8_t* lower, const uint8_t* upper, int64_t k) {
  constexpr int low = lower_bits(BITS);
  vi codes = unpack_plane<low>(lower, k);
  if constexpr (low < BITS) codes |= unpack_plane<BITS - low>(upper, k) << low;
  return codes;
}

}  // namespace MB_ISA
}  // namespace mixbits
