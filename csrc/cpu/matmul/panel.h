// What the gemm path (gemm.cpp) multiplies with: three kinds of arithmetic, and how a dword
// of packed codes becomes dwords of each kind.
#pragma once

#include "activations.h"
#include "bfloat16.h"

#if defined(__AVX512VNNI__)
namespace mixbits {
namespace MB_ISA {

// --- arithmetic ---------------------------------------------------------------------------------

struct Int8 {
  static constexpr int kWidth = 1;  // bytes of an element
  static constexpr bool kScaledTokens = true;
  using Sum = __m512i;
  static Sum start(const int32_t* p) { return _mm512_set1_epi32(*p); }
  static Sum dot(Sum sum, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(sum, w, x); }
};

struct Int16 {
  static constexpr int kWidth = 2;
  static constexpr bool kScaledTokens = true;
  using Sum = __m512i;
  static Sum start(const int32_t*) { return _mm512_setzero_si512(); }
  static Sum dot(Sum sum, __m512i w, __m512i x) { return _mm512_dpwssd_epi32(sum, w, x); }
};

MB_INLINE __m512 add_scaled(__m512i sum, __m512 row_scale, float token_scale, __m512 total) {
  const __m512 factor = _mm512_mul_ps(row_scale, _mm512_set1_ps(token_scale));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, total);
}

#if defined(MB_BFLOAT16)
struct Bf16 {
  static constexpr int kWidth = 2;
  static constexpr bool kScaledTokens = false;
  using Sum = __m512;
  static Sum start(const int32_t*) { return _mm512_setzero_ps(); }
  static Sum dot(Sum sum, __m512i w, __m512i x) { return dot_bfloat16(sum, w, x); }
};

MB_INLINE __m512 add_scaled(__m512 sum, __m512 row_scale, float, __m512 total) {
  return _mm512_fmadd_ps(sum, row_scale, total);
}
#endif

template <class A>
constexpr int block_dwords() {
  return kBlock * A::kWidth / 4;
}

// --- decoding ------------------------------------------------------------------------------------

// rows[i] becomes the i-th dwords of the 16 vectors.
MB_INLINE void transpose(__m512i* rows) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

MB_INLINE __m512i and_mask(__m512i v, uint32_t mask) {
  return _mm512_and_si512(v, _mm512_set1_epi32(int32_t(mask)));
}

// One dword of codes of 16 rows -> the dwords of a panel, `stride` vectors apart. `offset` is what
// integer codes are counted from, in both halves of every lane.
template <class A, int ELEMENT>
struct Decoder;

template <int ELEMENT>
struct Decoder<Int8, ELEMENT> {
  MB_METHOD void store(__m512i codes, __m512i, __m512i* out, int stride) const {
    constexpr int bits = element_bits(ELEMENT);
    for (int p = 0; p < 8 / bits; ++p) {
      __m512i v = bits == 8 ? codes
                            : and_mask(_mm512_srli_epi32(codes, bits * p),
                                       0x01010101u * ((1u << bits) - 1));
      if (ELEMENT == kE2M1)
        v = (__m512i)look_up(
            (vi)v, _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
      _mm512_store_si512(out + p * stride, v);
    }
  }
};

template <int ELEMENT>
struct Decoder<Int16, ELEMENT> {
  __m512i table;
  Decoder() {
    alignas(64) int16_t twice[32] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    table = _mm512_load_si512(twice);
  }
  MB_METHOD void store(__m512i codes, __m512i offset, __m512i* out, int stride) const {
    constexpr int bits = element_bits(ELEMENT);
    for (int i = 0; i < 16 / bits; ++i) {
      const __m512i v =
          and_mask(_mm512_srli_epi32(codes, bits * i), 0x00010001u * ((1u << bits) - 1));
      _mm512_store_si512(out + i * stride, ELEMENT == kE2M1 ? _mm512_permutexvar_epi16(v, table)
                                                            : _mm512_sub_epi16(v, offset));
    }
  }
};

#if defined(MB_BFLOAT16)
// Codes of up to 4 bits: a table of 32 bfloat16, of e2m1 codes or of the integers from -16 on.
template <int ELEMENT>
struct Decoder<Bf16, ELEMENT> {
  __m512i table;
  Decoder() {
    alignas(64) uint16_t values[32];
    for (int i = 0; i < 32; ++i) {
      const float value = ELEMENT == kE2M1
                              ? minifloat_decode<float, int32_t>(i & 15, minifloat(kE2M1))
                              : float(i - 16);
      values[i] = uint16_t(bit_cast<uint32_t>(value) >> 16);
    }
    table = _mm512_load_si512(values);
  }
  MB_METHOD void store(__m512i codes, __m512i offset, __m512i* out, int stride) const {
    constexpr int bits = element_bits(ELEMENT);
    for (int i = 0; i < 16 / bits; ++i) {
      __m512i v = and_mask(_mm512_srli_epi32(codes, bits * i), 0x00010001u * ((1u << bits) - 1));
      if (ELEMENT != kE2M1)
        v = _mm512_sub_epi16(_mm512_add_epi16(v, _mm512_set1_epi16(16)), offset);
      _mm512_store_si512(out + i * stride, _mm512_permutexvar_epi16(v, table));
    }
  }
};

template <>
struct Decoder<Bf16, kInt8> {
  MB_METHOD void store(__m512i codes, __m512i offset, __m512i* out, int stride) const {
    const __m512i byte = _mm512_set1_epi32(0xff),
                  count_from = _mm512_and_si512(offset, _mm512_set1_epi32(0xffff));
    const auto to_float = [&](int shift) {
      const __m512i code = _mm512_and_si512(_mm512_srli_epi32(codes, shift), byte);
      return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_sub_epi32(code, count_from)));
    };
    for (int i = 0; i < 2; ++i) {
      const __m512i first = _mm512_srli_epi32(to_float(8 * i), 16);
      const __m512i second = and_mask(to_float(8 * i + 16), 0xffff0000u);
      _mm512_store_si512(out + i * stride, _mm512_or_si512(first, second));
    }
  }
};

template <int ELEMENT>
struct ByteDecoder {
  ByteTables tables = byte_tables<ELEMENT>();
  MB_METHOD void store(__m512i codes, __m512i, __m512i* out, int stride) const {
    __m512i high, low;
    look_up_bytes(tables, codes, &high, &low);
    const __m512i even = _mm512_or_si512(and_mask(low, 0x00ff00ffu),
                                         _mm512_slli_epi32(and_mask(high, 0x00ff00ffu), 8));
    const __m512i odd = _mm512_or_si512(and_mask(_mm512_srli_epi32(low, 8), 0x00ff00ffu),
                                        and_mask(high, 0xff00ff00u));
    _mm512_store_si512(out, even);
    _mm512_store_si512(out + stride, odd);
  }
};
template <>
struct Decoder<Bf16, kE4M3> : ByteDecoder<kE4M3> {};
template <>
struct Decoder<Bf16, kE5M2> : ByteDecoder<kE5M2> {};
#endif

}  // namespace MB_ISA
}  // namespace mixbits
#endif
