// Quantization and dequantization of one group, and of runs of groups, in float32.
//
// A run is at most kRun = 128 columns, the least common multiple of all group sizes, held in a
// small buffer that is filled with zeros beyond the row's end. Zeros change no scale: bounds of
// an integer group include 0 anyway.
#pragma once

#include "simd.h"

namespace mixbits {
namespace MB_ISA {

constexpr int kRun = 128;

// Calls f(Tag<element>()), so that the element's constants are known to the compiler.
template <int V>
struct Tag {
  static constexpr int value = V;
};

template <class F>
MB_INLINE void with_element(int element, F&& f) {
  switch (element) {
    case kE2M1:
      return f(Tag<kE2M1>());
    case kE4M3:
      return f(Tag<kE4M3>());
    case kE5M2:
      return f(Tag<kE5M2>());
    case kInt2:
      return f(Tag<kInt2>());
    case kInt4:
      return f(Tag<kInt4>());
    default:
      return f(Tag<kInt8>());
  }
}

// --- bounds ---------------------------------------------------------------------------------

// The bits of the largest magnitude: NaN and infinity are above all numbers.
MB_INLINE int32_t largest_magnitude(const float* x, int count) {
  vi top = {};
  for (int i = 0; i < count; i += kLanes) {
    const vi bits = load_raw<vi>(x + i) & 0x7fffffff;
    top = bits > top ? bits : top;
  }
  int32_t lane[kLanes], result = 0;
  store_raw(lane, top);
  for (int i = 0; i < kLanes; ++i) result = lane[i] > result ? lane[i] : result;
  return result;
}

MB_INLINE IntGroup bound_int_group(const float* x, int count, int bits, bool symmetric) {
  vf low = {}, high = {};
  vi top = {};
  for (int i = 0; i < count; i += kLanes) {
    const vf v = load(x + i);
    const vi magnitude = bit_cast<vi>(v) & 0x7fffffff;
    low = v < low ? v : low;
    high = v > high ? v : high;
    top = magnitude > top ? magnitude : top;
  }
  float lows[kLanes], highs[kLanes];
  int32_t tops[kLanes];
  store(lows, low);
  store(highs, high);
  store_raw(tops, top);
  for (int i = 1; i < kLanes; ++i) {
    lows[0] = lows[i] < lows[0] ? lows[i] : lows[0];
    highs[0] = highs[i] > highs[0] ? highs[i] : highs[0];
    tops[0] = tops[i] > tops[0] ? tops[i] : tops[0];
  }
  return int_group(lows[0], highs[0], tops[0] < 0x7f800000, bits, symmetric);
}

// --- float -> float ---------------------------------------------------------------------------

// Round trip of one group: x[count] -> q[count].
template <int ELEMENT>
MB_INLINE void fake_group(const float* x, float* q, int count, const Format format) {
  if (is_mx(ELEMENT)) {
    constexpr Minifloat element = minifloat(ELEMENT);
    const int byte = mx_scale(largest_magnitude(x, count), ELEMENT, format.scale_mode);
    // In a NaN block both factors are NaN, and so is every product.
    const float scale = e8m0_to_float(byte), reciprocal = e8m0_reciprocal(byte);
    for (int i = 0; i < count; i += kLanes) {
      store(q + i, minifloat_round<vf, vi>(load(x + i) * reciprocal, element) * scale);
    }
  } else {
    constexpr int bits = element_bits(ELEMENT);
    const IntGroup group = bound_int_group(x, count, bits, format.symmetric);
    for (int i = 0; i < count; i += kLanes) {
      const vf code = int_round(load(x + i), group.scale, group.offset, bits);
      store(q + i, (code - group.offset) * group.scale);
    }
  }
}

// Round trip of a run: x and q of `padded` columns, a multiple of the format's group size.
MB_INLINE void fake_run(const float* x, float* q, int padded, const Format format) {
  with_element(format.element, [&](auto tag) {
    for (int k = 0; k < padded; k += format.group_size) {
      fake_group<decltype(tag)::value>(x + k, q + k, format.group_size, format);
    }
  });
}

// --- float -> codes -----------------------------------------------------------------------------

// A group's codes, one byte each, and its scale (e8m0 byte or float16) and offset.
struct GroupScale {
  uint16_t scale;
  uint8_t zero_point;
};

template <int ELEMENT>
MB_INLINE GroupScale encode_group(const float* x, uint8_t* codes, int count, const Format format) {
  if (is_mx(ELEMENT)) {
    constexpr Minifloat element = minifloat(ELEMENT);
    const int byte = mx_scale(largest_magnitude(x, count), ELEMENT, format.scale_mode);
    const float reciprocal = e8m0_reciprocal(byte);
    const int32_t keep = byte == kNanScale ? 0 : 0xff;  // a NaN block has codes 0
    for (int i = 0; i < count; i += kLanes) {
      const vi code = minifloat_encode<vf, vi>(load(x + i) * reciprocal, element) & keep;
      store_raw(codes + i, narrow_to_bytes(code));
    }
    return {uint16_t(byte), 0};
  }
  constexpr int bits = element_bits(ELEMENT);
  const IntGroup group = bound_int_group(x, count, bits, format.symmetric);
  const int32_t keep = group.finite ? 0xff : 0;
  for (int i = 0; i < count; i += kLanes) {
    const vf rounded = int_round(load(x + i), group.scale, group.offset, bits);
    store_raw(codes + i, narrow_to_bytes(small_to_int<vf, vi>(rounded) & keep));
  }
  return {group.scale_half, uint8_t(group.offset)};
}

// --- codes -> float
// -------------------------------------------------------------------------------

// kLanes codes beginning at `p`, which is the byte where code number (a multiple of kLanes) starts.
template <int BITS>
MB_INLINE vi unpack(const uint8_t* p) {
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
  memcpy(&word, p, kLanes * BITS / 8);
  return (splat_i(word) >> (lane * BITS)) & ((1 << BITS) - 1);
}

// One row of a packed weight.
struct PackedRow {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* zero_points;  // null for formats without
};

// A whole one; csrc/layout.h says where its bits are.
struct PackedWeight {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* zero_points;
  int64_t columns;
  Format format;

  PackedRow row(int64_t n) const {
    const int bits = element_bits(format.element);
    const int64_t groups = group_count(columns, format.group_size);
    return {codes + n * packed_bytes(columns, bits),
            scales + n * groups * scale_bytes(format.element),
            zero_points ? zero_points + n * packed_bytes(groups, bits) : nullptr};
  }
};

// What the codes of group number `g` are multiplied by, and counted from (integers).
struct GroupValue {
  float scale;
  float offset;
};

template <int ELEMENT>
MB_INLINE GroupValue group_value(const PackedRow& row, int64_t g) {
  if (is_mx(ELEMENT)) return {e8m0_to_float(row.scales[g]), 0.0f};
  constexpr int bits = element_bits(ELEMENT);
  uint16_t half;
  memcpy(&half, row.scales + 2 * g, 2);
  const int offset = row.zero_points ? unpack_code(row.zero_points, g, bits) : 1 << (bits - 1);
  return {half_to_float(half), float(offset)};
}

// kLanes codes -> their values before scaling.
template <int ELEMENT>
MB_INLINE vf decode(vi codes, float offset) {
#if defined(__AVX512F__)
  if (ELEMENT == kE2M1) {
    const __m512 table = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f,  //
                                        -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
    return (vf)_mm512_permutexvar_ps((__m512i)codes, table);
  }
#endif
  if (is_mx(ELEMENT)) return minifloat_decode<vf, vi>(codes, minifloat(ELEMENT));
  return small_to_float<vf, vi>(codes) - offset;
}

// The codes of columns [first, first + count), as bytes that may be read to a whole kRun.
struct RunBytes {
  uint8_t copy[kRun];
  const uint8_t* data;
};

template <int BITS>
MB_INLINE void run_bytes(const PackedRow& row, int64_t first, int count, RunBytes* out) {
  out->data = row.codes + first * BITS / 8;
  if (count == kRun) return;
  memset(out->copy, 0, sizeof(out->copy));
  memcpy(out->copy, out->data, packed_bytes(count, BITS));
  out->data = out->copy;
}

// Values of the columns [first, first + count) of a row; `first` is a multiple of kRun and count
// at most kRun. Writes whole groups: what lies beyond the row's end is undefined but finite or NaN.
template <int ELEMENT>
MB_INLINE void decode_run(const PackedRow& row, int group_size, int64_t first, int count,
                          float* out) {
  constexpr int bits = element_bits(ELEMENT);
  RunBytes bytes;
  run_bytes<bits>(row, first, count, &bytes);
  int64_t g = first / group_size;
  for (int k = 0; k < count; k += group_size, ++g) {
    const GroupValue group = group_value<ELEMENT>(row, g);
    for (int i = k; i < k + group_size; i += kLanes) {
      const vi codes = unpack<bits>(bytes.data + i * bits / 8);
      store(out + i, decode<ELEMENT>(codes, group.offset) * group.scale);
    }
  }
}

}  // namespace MB_ISA
}  // namespace mixbits
