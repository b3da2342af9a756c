// Quantization and dequantization of one group, and of runs of groups, in float32.
//
// A run is at most kRun = 128 columns, the least common multiple of all group sizes. Groups are
// read from where they lie, in registers; only the short one at a row's end is copied to a small
// buffer that is filled with zeros. Zeros change no scale: bounds of an integer group include 0
// anyway.
#pragma once

#include "pairs.h"
#include "planes.h"

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
    case kE2M3:
      return f(Tag<kE2M3>());
    case kInt3:
      return f(Tag<kInt3>());
    case kInt5:
      return f(Tag<kInt5>());
    case kInt6:
      return f(Tag<kInt6>());
    case kMXInt8:
      return f(Tag<kMXInt8>());
    case kNVE2M1:
      return f(Tag<kNVE2M1>());
    case kRowE4M3:
      return f(Tag<kRowE4M3>());
    case kRowInt8:
      return f(Tag<kRowInt8>());
    default:
      return f(Tag<kInt8>());
  }
}

// The same for a count of 1 to MOST; what is beyond counts as MOST.
template <int MOST, class F>
MB_INLINE void with_count(int64_t count, F&& f) {
  if constexpr (MOST > 1) {
    if (count < MOST) return with_count<MOST - 1>(count, f);
  }
  f(Tag<MOST>());
}

// The same for the dtype of a tensor.
template <class F>
MB_INLINE void with_dtype(int dtype, F&& f) {
  switch (dtype) {
    case kBFloat16:
      return f(Tag<kBFloat16>());
    case kFloat16:
      return f(Tag<kFloat16>());
    default:
      return f(Tag<kFloat32>());
  }
}

// --- bounds ---------------------------------------------------------------------------------

// A tensor's elements as signed integers: of one sign, they are ordered as the numbers are, with
// infinity and NaN above all.
template <int DTYPE>
struct Words {
  typedef int16_t vector __attribute__((vector_size(kLanes * 4)));
  static constexpr int lanes = 2 * kLanes;
  static constexpr int16_t sign = -0x8000, magnitude = 0x7fff;
  static constexpr int16_t infinity = DTYPE == kFloat16 ? 0x7c00 : 0x7f80;
};
template <>
struct Words<kFloat32> {
  typedef vi vector;
  static constexpr int lanes = kLanes;
  static constexpr int32_t sign = int32_t(0x80000000), magnitude = 0x7fffffff;
  static constexpr int32_t infinity = 0x7f800000;
};

template <class V>
MB_INLINE V max_of(V a, V b) {
  return a > b ? a : b;
}

// The largest lane; none is negative.
MB_INLINE int32_t max_lane(Words<kBFloat16>::vector v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m512i all = (__m512i)v;
  const __m256i half =
      _mm256_max_epi16(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
#else
  const __m256i half = (__m256i)v;
#endif
  const __m128i low = _mm256_castsi256_si128(half), high = _mm256_extracti128_si256(half, 1);
  const __m128i flip = _mm_set1_epi16(0x7fff);  // there is an instruction for the smallest lane
  return 0x7fff ^ _mm_extract_epi16(_mm_minpos_epu16(flip ^ _mm_max_epi16(low, high)), 0);
#else
  int32_t result = 0;
  for (int i = 0; i < 2 * kLanes; ++i) result = v[i] > result ? v[i] : result;
  return result;
#endif
}

MB_INLINE int32_t max_lane(vi v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m512i all = (__m512i)v;
  const __m256i half =
      _mm256_max_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
#else
  const __m256i half = (__m256i)v;
#endif
  const __m128i low = _mm256_castsi256_si128(half), high = _mm256_extracti128_si256(half, 1);
  __m128i top = _mm_max_epi32(low, high);
  top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(top, _mm_shuffle_epi32(top, 0xb1)));
#else
  int32_t result = 0;
  for (int i = 0; i < kLanes; ++i) result = v[i] > result ? v[i] : result;
  return result;
#endif
}

// The float of an element's magnitude, given as its word.
template <int DTYPE>
MB_INLINE float magnitude_value(int32_t word) {
  if (DTYPE == kFloat16) return half_to_float(uint16_t(word));
  return bit_cast<float>(DTYPE == kBFloat16 ? word << 16 : word);
}

// --- scales -------------------------------------------------------------------------------------
//
// Scales come before rounding, for many groups at a time: the way from elements through a scale
// to a rounded element is so long that a CPU cannot keep enough single groups in flight.

constexpr int kBatch = 64;

// Of a batch of groups: the largest of positive and of negative elements, as magnitudes; infinite
// or NaN where such an element is. MX needs no signs: there `high` is the largest of all.
struct Bounds {
  alignas(64) float low[kBatch];
  alignas(64) float high[kBatch];
};

// What elements are multiplied by and divided by, what integers are counted from, and the scale
// as it is stored. A group that cannot be quantized has a NaN scale and offset 0.
struct Scales {
  alignas(64) float scale[kBatch];
  alignas(64) float reciprocal[kBatch];
  alignas(64) float offset[kBatch];
  alignas(64) uint16_t stored[kBatch];
};

// Bounds of `groups` groups of `columns` columns, as numbers `first` and following of a batch.
template <bool IS_MX, int DTYPE>
MB_INLINE void find_bounds(const char* x, int first, int groups, int columns, Bounds* out) {
  typedef Words<DTYPE> W;
  typedef typename W::vector V;
  for (int g = first; g < first + groups; ++g) {
    V low = {}, high = {};
    for (int i = 0; i < columns; i += W::lanes, x += sizeof(V)) {
      const V words = load_raw<V>(x);
      high = max_of<V>(high, IS_MX ? V(words & W::magnitude) : words);
      if (!IS_MX) low = max_of<V>(low, words ^ W::sign);
    }
    out->high[g] = magnitude_value<DTYPE>(max_lane(high));
    if (!IS_MX) out->low[g] = magnitude_value<DTYPE>(max_lane(low));
  }
}

template <int ELEMENT>
MB_INLINE void mx_scales(const Bounds& bounds, int groups, int scale_mode, Scales* out) {
  for (int g = 0; g < groups; ++g) {
    const int byte = mx_scale(bit_cast<int32_t>(bounds.high[g]), ELEMENT, scale_mode);
    out->scale[g] = e8m0_to_float(byte);
    out->reciprocal[g] = e8m0_reciprocal(byte);
    out->offset[g] = 128.0f;  // of integers
    out->stored[g] = uint16_t(byte);
  }
}

// int_group of formats.h for kLanes groups.
MB_INLINE void int_scales(const Bounds& bounds, int g, int bits, bool symmetric, Scales* out) {
  const vf high = load(bounds.high + g), low = load(bounds.low + g);  // magnitudes both
  const float floor = half_to_float(kMinIntScale);
  const vf least = splat(floor), negative_least = splat(-floor);
  const float top = float((1 << bits) - 1), half = float(1 << (bits - 1));
  const vf raw = symmetric ? (high < low ? low : -high) / half : (high + low) / top;
  vf scale = to_float(from_float(raw, kFloat16), kFloat16);
  const vf negative = scale < negative_least ? scale : negative_least;
  const vf positive = scale > least ? scale : least;
  scale = symmetric ? (scale < 0 ? negative : positive) : positive;
  vf offset = splat(half);
  if (!symmetric) {
    const vf most = splat(top);
    offset = (low / scale + kRoundMagic) - kRoundMagic;
    offset = offset < most ? offset : most;
  }
  const vi finite = (bit_cast<vi>(high) < 0x7f800000) & (bit_cast<vi>(low) < 0x7f800000) &
                    ((bit_cast<vi>(scale) & 0x7fffffff) < 0x7f800000);
  const vf nan = bit_cast<vf>(splat_i(0x7fc00000));
  scale = finite ? scale : nan;
  store(out->scale + g, scale);
  store(out->reciprocal + g, 1.0f / scale);
  store(out->offset + g, bit_cast<vf>(vi(bit_cast<vi>(offset) & finite)));
  store_raw(out->stored + g, from_float(scale, kFloat16));
}

// The bits of the largest magnitude of some float32 numbers: NaN and infinity are above all.
MB_INLINE int32_t largest_magnitude(const float* x, int count) {
  Bounds bounds;
  find_bounds<true, kFloat32>((const char*)x, 0, 1, count, &bounds);
  return bit_cast<int32_t>(bounds.high[0]);
}

// Scales of the first `groups` groups of a batch; fills it up with zeros to a whole vector.
template <int ELEMENT>
MB_INLINE void scales_of_bounds(Bounds& bounds, int groups, const Format format, Scales* out) {
  if (is_mx(ELEMENT)) return mx_scales<ELEMENT>(bounds, groups, format.scale_mode, out);
  for (int g = groups; g % kLanes != 0; ++g) bounds.low[g] = bounds.high[g] = 0;
  for (int g = 0; g < groups; g += kLanes) {
    int_scales(bounds, g, element_bits(ELEMENT), format.symmetric, out);
  }
}

// The columns of a group: a constant where the element has one group size.
template <int ELEMENT>
MB_INLINE int columns_of_group(const Format format) {
  return is_mx(ELEMENT) ? 32 : ELEMENT == kNVE2M1 ? 16 : format.group_size;
}

template <int ELEMENT, int DTYPE>
static void find_scales(const char* x, int groups, const Format format, Scales* out) {
  Bounds bounds;
  find_bounds<is_mx(ELEMENT), DTYPE>(x, 0, groups, columns_of_group<ELEMENT>(format), &bounds);
  scales_of_bounds<ELEMENT>(bounds, groups, format, out);
}

// --- rounding -----------------------------------------------------------------------------------

// x / divisor, correctly rounded where its magnitude is between 2^-3 and 2^20 (below, it is close
// enough to become 0), given the divisor's rounded reciprocal. The corrected quotient is within
// 2^-22 units of its last place before its own rounding; the divisor, a float16, has 11 digits,
// so that x / divisor is never closer than 2^-12 units to a number midway between two floats.
MB_INLINE vf divide(vf x, float divisor, float reciprocal) {
#if defined(__AVX2__)
  const vf quotient = x * reciprocal;
  const vf rest = fma(-quotient, splat(divisor), x);
  return fma(rest, splat(reciprocal), quotient);
#else
  (void)reciprocal;
  return x / divisor;
#endif
}

// What integers of code 0 are, as a sum with round_magic.
template <int ELEMENT>
MB_INLINE float lowest_sum(const Scales& scales, int g) {
  return round_magic(ELEMENT) - scales.offset[g] * unit_of(ELEMENT);
}

// Rounds the elements of one group, number `g` of a batch.
template <int ELEMENT>
struct Rounding {
  // Integers: a rounded number is kept as its sum with round_magic, where clamping is the same
  // and the code is in the lowest bits.
  float scale, reciprocal, lowest, highest;
  int32_t keep;  // MX: 0 in a NaN block, whose codes are 0

  Rounding(const Scales& scales, int g)
      : scale(scales.scale[g]),
        reciprocal(scales.reciprocal[g]),
        lowest(is_float(ELEMENT) ? 0.0f : lowest_sum<ELEMENT>(scales, g)),
        highest(lowest + float((1 << element_bits(ELEMENT)) - 1) * unit_of(ELEMENT)),
        keep(scales.stored[g] == kNanScale ? 0 : 0xff) {}

  // In a group of NaN scale all sums are `lowest`.
  vf sum(vf x) const {
    const vf quotient = is_mx(ELEMENT) ? x * reciprocal : divide(x, scale, reciprocal);
    const vf rounded = quotient + round_magic(ELEMENT);
    const vf low = splat(lowest), high = splat(highest);
    const vf floored = rounded > low ? rounded : low;
    return floored < high ? floored : high;
  }
  vf value(vf x) const {
    if (!is_float(ELEMENT)) return (sum(x) - round_magic(ELEMENT)) * scale;
    // In a NaN block both factors are NaN, and so is every product.
    return minifloat_round<vf, vi>(x * reciprocal, minifloat(ELEMENT)) * scale;
  }
  vi code(vf x) const {
    if (!is_float(ELEMENT)) return bit_cast<vi>(sum(x)) - bit_cast<int32_t>(lowest);
    return minifloat_encode<vf, vi>(x * reciprocal, minifloat(ELEMENT)) & keep;
  }
};

// --- values -> values ---------------------------------------------------------------------------

// Round trip of `groups` (at most kBatch) groups, x -> q, both of DTYPE.
template <int ELEMENT, int DTYPE, bool STREAM>
static void fake_groups(const char* x, char* q, int groups, const Format format) {
  constexpr int step = kPair * dtype_bytes(DTYPE);
  // The grid of MX has fewer digits than bfloat16, and its numbers lie on x's own grid or are x.
  constexpr bool exact = is_mx(ELEMENT);
  const int columns = columns_of_group<ELEMENT>(format);
  Scales scales;
  find_scales<ELEMENT, DTYPE>(x, groups, format, &scales);
  for (int g = 0; g < groups; ++g) {
    const Rounding<ELEMENT> group(scales, g);
    for (int k = 0; k < columns; k += kPair, x += step, q += step) {
      const Pair v = load_pair<DTYPE>(x);
      store_pair<DTYPE, exact, STREAM>(q, {group.value(v.a), group.value(v.b)});
    }
  }
}

// --- values -> codes ----------------------------------------------------------------------------

// `groups` (at most kBatch) groups of DTYPE -> their packed codes and scales.
template <int ELEMENT, int DTYPE>
static void pack_groups(const char* x, Planes out, int groups, const Format format,
                        Scales* scales) {
  constexpr int step = kPair * dtype_bytes(DTYPE), bits = element_bits(ELEMENT);
  const int columns = columns_of_group<ELEMENT>(format);
  find_scales<ELEMENT, DTYPE>(x, groups, format, scales);
  for (int g = 0; g < groups; ++g) {
    const Rounding<ELEMENT> group(*scales, g);
    for (int k = 0; k < columns; k += kPair, x += step, out = out.at(kPair, bits)) {
      const Pair v = load_even_odd<DTYPE>(x);
      store_codes<bits>(out, group.code(v.a), group.code(v.b));
    }
  }
}

// --- codes -> values ----------------------------------------------------------------------------

// One row of a packed weight.
struct PackedRow {
  const uint8_t* codes;
  const uint8_t* upper;  // the second plane of codes, where there is one
  const uint8_t* scales;
  const uint8_t* zero_points;  // null for formats without
  int64_t groups;
  float divisor;  // of scales in e4m3
};

// A whole one; csrc/layout.h says where its bits are. Sizes are of a row.
struct PackedWeight {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* zero_points;
  float divisor;
  int64_t columns;
  Format format;
  int64_t groups, code_bytes, scale_row_bytes, zero_point_bytes;

  PackedWeight() = default;
  // A format 0 stands for elements that were left alone, in no groups.
  PackedWeight(const uint8_t* c, const uint8_t* s, const uint8_t* z, const void* d, int64_t k,
               const Format& f)
      : codes(c), scales(s), zero_points(z), divisor(1), columns(k), format(f) {
    if (d) memcpy(&divisor, d, sizeof(divisor));
    const int bits = element_bits(f.element);
    groups = f.group_size ? scale_count(k, f) : 0;
    code_bytes = packed_bytes(k, bits);
    scale_row_bytes = groups * scale_bytes(f.element);
    zero_point_bytes = packed_bytes(groups, bits);
  }

  PackedRow row(int64_t n) const {
    const uint8_t* const first = codes + n * code_bytes;
    return {first,
            first + upper_plane(columns, element_bits(format.element)),
            scales + n * scale_row_bytes,
            zero_points ? zero_points + n * zero_point_bytes : nullptr,
            groups,
            divisor};
  }
};

// What the codes of group number `g` are multiplied by, and counted from (integers).
struct GroupValue {
  float scale;
  float offset;
};

template <int ELEMENT>
MB_INLINE GroupValue group_value(const PackedRow& row, int64_t g) {
  if (ELEMENT == kNVE2M1) {
    const float scale = minifloat_decode<float, int32_t>(row.scales[g], minifloat(kE4M3));
    return {scale / row.divisor, 0.0f};
  }
  if (is_mx(ELEMENT)) return {e8m0_to_float(row.scales[g]) * unit_of(ELEMENT), 128.0f};
  if (has_row_scale(ELEMENT)) {
    float scale;
    memcpy(&scale, row.scales, sizeof(scale));
    return {scale, 128.0f};
  }
  constexpr int bits = element_bits(ELEMENT);
  uint16_t half;
  memcpy(&half, row.scales + 2 * g, 2);
  const int offset =
      row.zero_points ? unpack_code(row.zero_points, g, bits, row.groups) : 1 << (bits - 1);
  return {half_to_float(half), float(offset)};
}

// kLanes codes -> their values before scaling.
template <int ELEMENT>
MB_INLINE vf decode(vi codes, float offset) {
#if defined(__AVX512F__)
  if (ELEMENT == kE2M1 || ELEMENT == kNVE2M1) {
    const __m512 table = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f,  //
                                        -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
    return (vf)_mm512_permutexvar_ps((__m512i)codes, table);
  }
#endif
  if (is_float(ELEMENT)) return minifloat_decode<vf, vi>(codes, minifloat(ELEMENT));
  return small_to_float<vf, vi>(codes) - offset;
}

// The codes of columns [first, first + count), as planes that may be read to a whole kRun.
struct RunBytes {
  uint8_t copy[kRun];
  const uint8_t *lower, *upper;
};

template <int BITS>
MB_INLINE void run_bytes(const PackedRow& row, int64_t first, int count, RunBytes* out) {
  constexpr int low = lower_bits(BITS), rest = BITS - low;
  out->lower = row.codes + first * low / 8;
  out->upper = row.upper + first * rest / 8;
  if (count == kRun) return;
  uint8_t* const upper = out->copy + kRun * low / 8;
  memset(out->copy, 0, sizeof(out->copy));
  memcpy(out->copy, out->lower, plane_bytes(count, low));
  if (rest) memcpy(upper, out->upper, plane_bytes(count, rest));
  out->lower = out->copy;
  out->upper = upper;
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
      const vi codes = unpack<bits>(bytes.lower, bytes.upper, i);
      store(out + i, decode<ELEMENT>(codes, group.offset) * group.scale);
    }
  }
}

}  // namespace MB_ISA
}  // namespace mixbits
