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

#if defined(__AVX2__)
// As many bytes as a vector has lower halves of bytes, or words.
typedef uint8_t v_bytes __attribute__((vector_size(kLanes * 4)));
typedef uint16_t v_words __attribute__((vector_size(kLanes * 4)));

// The halves of kLanes * 2 bytes, lower one first, as bytes.
MB_INLINE vi spread_nibbles(const uint8_t* p) {
#if defined(__AVX512F__)
  const vi words = (vi)_mm512_cvtepu8_epi16(load_raw<__m256i>(p));
  const __m512i masks = _mm512_set1_epi8(0x0f);  // (words | words << 4) & masks
  return (vi)_mm512_ternarylogic_epi32((__m512i)words, (__m512i)(words << 4), masks, 0xa8);
#else
  // Of a byte that is there twice, the first keeps its lower half and the second its upper one,
  // and the sum of the first and 16 times the second is a word.
  v_bytes source;
  for (int i = 0; i < kLanes * 4; ++i) source[i] = uint8_t(i / 2);
  const __m256i twice =
      _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_raw<__m128i>(p)), (__m256i)source);
  const __m256i halves = twice & _mm256_set1_epi16(int16_t(0xf00f));
  return (vi)_mm256_maddubs_epi16(halves, _mm256_set1_epi16(0x1001));
#endif
}

// Pairs of bits of kLanes bytes, the lowest first, in bits 4 and 5 of a vector's bytes; the others
// hold anything.
MB_INLINE vi spread_pairs(const uint8_t* p) {
  v_bytes source;
  v_words mask, factor;
  for (int i = 0; i < kLanes * 4; ++i) source[i] = i % 2 ? 0x80 : uint8_t(i / 4);  // 0x80: zero
  for (int i = 0; i < kLanes * 2; ++i) {
    mask[i] = i % 2 ? 0xf0 : 0x0f;  // a word takes four bits, of which a byte takes two
    factor[i] = i % 2 ? 1 | 1 << 6 : 1 << 4 | 1 << 10;
  }
#if defined(__AVX512F__)
  const __m128i bytes = load_raw<__m128i>(p);
#else
  const __m128i bytes = _mm_set1_epi64x(load_raw<int64_t>(p));
#endif
  return (vi)(((v_words)look_up((vi)source, bytes) & mask) * factor);
}

// A vector of bytes of the first plane, with what belongs to it in the second, as bytes that have
// one code each: out[i] is number i of every byte of the first plane.
template <int BITS>
MB_INLINE void join_planes(vi bytes, const uint8_t* upper, vi* out) {
  static_assert(BITS == 3 || BITS == 5 || BITS == 6, "codes in two planes");
  if constexpr (BITS == 3) {
    // Codes 0 and 2 of a byte, then 1 and 3, get their upper bits while they are still side by
    // side: of a nibble, bits 0 and 2, or 1 and 3, go to bits 2 and 6.
    const __m128i evens = _mm_setr_epi32(0x04000400, 0x44404440, 0x04000400, 0x44404440);
    const __m128i odds = _mm_setr_epi32(0x04040000, 0x04040000, 0x44444040, 0x44444040);
    const vi nibbles = spread_nibbles(upper);
    const vi even = (bytes & 0x33333333) | look_up(nibbles, evens);
    const vi odd = (bytes >> 2 & 0x33333333) | look_up(nibbles, odds);
    out[0] = even & 0x0f0f0f0f;
    out[1] = odd & 0x0f0f0f0f;
    out[2] = even >> 4 & 0x0f0f0f0f;
    out[3] = odd >> 4 & 0x0f0f0f0f;
  } else if constexpr (BITS == 5) {
    const vi above = spread_pairs(upper);
    out[0] = (bytes & 0x0f0f0f0f) | (above & 0x10101010);
    out[1] = (bytes >> 4 & 0x0f0f0f0f) | (above >> 1 & 0x10101010);
  } else {
    const vi nibbles = spread_nibbles(upper);
    const __m128i evens = _mm_set1_epi32(0x30201000);
    const __m128i odds = _mm_setr_epi32(0, 0x10101010, 0x20202020, 0x30303030);
    out[0] = (bytes & 0x0f0f0f0f) | look_up(nibbles, evens);
    out[1] = (bytes >> 4 & 0x0f0f0f0f) | look_up(nibbles, odds);
  }
}
#endif

}  // namespace MB_ISA
}  // namespace mixbits
