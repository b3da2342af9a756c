// Formats whose scales follow from the largest magnitude of a whole row or tensor: NVFP4, and those
// with one float32 scale for a row.
//
// `find_spans` goes through a tensor once for what its rows give to their scales (`span_of` in
// formats.h). Then rows are rounded, kRun columns at a time in float32, in their own order, which
// suits groups of 16 columns on every instruction set. Divisions are true ones: scales are no
// powers of two.
#pragma once

#include "cpu/ops.h"
#include "group.h"

namespace mixbits {
namespace MB_ISA {

static_assert(kRun == kRowColumns, "a row's columns are taken a run at a time");

// Rounds every lane by a scale of its own.
template <int ELEMENT>
struct LaneRounding {
  vf scale, reciprocal, offset;  // as in Scales; MX only needs the reciprocal

  // What x is as a number of steps, or of the element's units.
  vf quotient(vf x) const {
    if (!is_mx(ELEMENT)) return x / scale;
    return x * reciprocal / unit_of(ELEMENT);  // a power of two
  }
  // Integers: the code as a float.
  vf clamped(vf x) const {
    const vf rounded = ((quotient(x) + kRoundMagic) - kRoundMagic) + offset;
    const vf zero = {}, top = splat(float((1 << element_bits(ELEMENT)) - 1));
    const vf floored = rounded > zero ? rounded : zero;
    return floored < top ? floored : top;
  }
  vf value(vf x) const {
    if (!is_float(ELEMENT)) return (clamped(x) - offset) * (scale * unit_of(ELEMENT));
    return minifloat_round<vf, vi>(quotient(x), minifloat(ELEMENT)) * scale;
  }
  vi code(vf x) const {
    if (!is_float(ELEMENT)) return small_to_int<vf, vi>(clamped(x));
    return minifloat_encode<vf, vi>(quotient(x), minifloat(ELEMENT)) & (scale == scale);
  }
};

// --- spans --------------------------------------------------------------------------------------

// The largest magnitude of the finite numbers of a row or a tensor, and whether all are.
struct Maximum {
  float finite;
  bool all;
};

template <int DTYPE>
MB_INLINE Maximum maximum_of(const char* x, int64_t count) {
  typedef Words<DTYPE> W;
  typedef typename W::vector V;
  V highest = {}, finite = {};
  const V infinity = W::infinity - V{};
  for (int64_t i = 0; i < count; i += W::lanes, x += sizeof(V)) {
    V words = {};
    const int64_t left = (count - i) * dtype_bytes(DTYPE);
    if (left >= int64_t(sizeof(V))) {
      words = load_raw<V>(x);
    } else {
      memcpy(&words, x, left);
    }
    words &= W::magnitude;
    highest = max_of<V>(highest, words);
    finite = max_of<V>(finite, words & (words < infinity));
  }
  return {magnitude_value<DTYPE>(max_lane(finite)),
          magnitude_value<DTYPE>(max_lane(highest)) < __builtin_inff()};
}

// The span of what has this maximum: float32 scales are NaN where not all numbers are finite.
MB_INLINE float span_of(const Maximum& maximum, int element) {
  const bool nan = has_row_scale(element) && !maximum.all;
  return mixbits::span_of(nan ? __builtin_nanf("") : maximum.finite, element);
}

// Of every row of x [rows, columns] in every format, which are given by their codes; those that
// need no spans leave theirs as they are. `out` is [formats, rows].
static inline void find_spans(const void* x, int64_t rows, int64_t columns, int dtype,
                              const int* formats, int count, float* out) {
  const bool serial = rows == 1 || rows * group_count(columns, kRun) <= kSerialRuns;
#pragma omp parallel for schedule(static) if (!serial)
  for (int64_t row = 0; row < rows; ++row) {
    const char* p = static_cast<const char*>(x) + row * columns * dtype_bytes(dtype);
    Maximum maximum;
    with_dtype(dtype, [&](auto tag) { maximum = maximum_of<decltype(tag)::value>(p, columns); });
    for (int f = 0; f < count; ++f) {
      const int element = decode_format(formats[f]).element;
      if (has_span(element)) out[f * rows + row] = span_of(maximum, element);
    }
  }
  for (int f = 0; f < count; ++f) {
    const Format format = decode_format(formats[f]);
    if (format.element != kNVE2M1 || format.per_row) continue;
    float* const spans = out + f * rows;
    float least = spans[0];  // the divisor that the largest maximum has
    for (int64_t row = 1; row < rows; ++row) least = spans[row] < least ? spans[row] : least;
    for (int64_t row = 0; row < rows; ++row) spans[row] = least;
  }
}

static inline bool need_spans(const int* formats, int count) {
  for (int f = 0; f < count; ++f) {
    if (has_span(decode_format(formats[f]).element)) return true;
  }
  return false;
}

// --- runs ---------------------------------------------------------------------------------------

// Of a run: what its elements are divided by and multiplied by, and as it is stored, group by
// group.
struct RunScales {
  alignas(64) float scale[16];
  alignas(64) int32_t stored[16];
};

template <int ELEMENT>
constexpr int kSpanGroup = has_row_scale(ELEMENT) ? kRun : 16;

// NaN where a bound is not finite.
MB_INLINE vf nan_unless_finite(vf bounds) {
  const vf nan = bit_cast<vf>(splat_i(0x7fc00000));
  return bit_cast<vi>(bounds) < 0x7f800000 ? bounds : nan;
}

// The scales of kLanes NVFP4 groups of these maxima, and their bytes.
MB_INLINE vf nv_scales(vf maxima, vf divisor, vi* stored) {
  *stored = nv_scale<vf, vi>(nan_unless_finite(maxima), divisor);
  return minifloat_decode<vf, vi>(*stored, minifloat(kE4M3)) / divisor;
}

// Of kRun numbers, zeros beyond the row's end.
template <int ELEMENT>
MB_INLINE void find_run_scales(const float* x, float span, RunScales* out) {
  if (has_row_scale(ELEMENT)) {
    out->scale[0] = span;
    out->stored[0] = bit_cast<int32_t>(span);
    return;
  }
  Bounds bounds;
  store(bounds.high + kRun / 16, vf{});  // a vector may have more lanes than there are groups
  find_bounds<true, kFloat32>((const char*)x, 0, kRun / 16, 16, &bounds);
  for (int g = 0; g < kRun / 16; g += kLanes) {
    vi stored;
    store(out->scale + g, nv_scales(load(bounds.high + g), splat(span), &stored));
    store_raw(out->stored + g, stored);
  }
}

// What rounds the run's columns k to k + kLanes.
template <int ELEMENT>
MB_INLINE LaneRounding<ELEMENT> lanes_at(const RunScales& scales, int k) {
  return {splat(scales.scale[k / kSpanGroup<ELEMENT>]), vf{}, splat(128.0f)};
}

// Round trip of kRun numbers; q may be x.
template <int ELEMENT>
MB_INLINE void fake_span_run(const float* x, float span, float* q) {
  RunScales scales;
  find_run_scales<ELEMENT>(x, span, &scales);
  for (int k = 0; k < kRun; k += kLanes)
    store(q + k, lanes_at<ELEMENT>(scales, k).value(load(x + k)));
}

// kRun numbers -> a plane of codes.
template <int ELEMENT>
MB_INLINE void pack_span_run(const float* x, float span, uint8_t* codes, RunScales* scales) {
  constexpr int bits = element_bits(ELEMENT);
  find_run_scales<ELEMENT>(x, span, scales);
  for (int k = 0; k < kRun; k += kPair) {
    const vi a = lanes_at<ELEMENT>(*scales, k).code(load(x + k));
    const vi b = lanes_at<ELEMENT>(*scales, k + kLanes).code(load(x + k + kLanes));
    store_plane<bits>(codes + k * bits / 8, every_second(a, b, 0), every_second(a, b, 1));
  }
}

// The columns [first, first + kRun) of a row as float32, zeros beyond its end.
MB_INLINE void load_run(const void* row, int64_t first, int64_t columns, int dtype, float* out) {
  const int64_t count = min64(columns - first, kRun);
  if (count < kRun) memset(out, 0, kRun * sizeof(float));
  load_row(static_cast<const char*>(row) + first * dtype_bytes(dtype), count, dtype, out);
}

// --- any format ---------------------------------------------------------------------------------

// Round trip of a run: x and q of `padded` columns, a multiple of the format's group size. A format
// that has_span is given it, and kRun numbers at a time, zeros beyond the row's end.
MB_INLINE void fake_run(const float* x, float* q, int padded, const Format format, float span) {
  with_element(format.element, [&](auto tag) {
    constexpr int element = decltype(tag)::value;
    if constexpr (has_span(element)) {
      for (int k = 0; k < padded; k += kRun) fake_span_run<element>(x + k, span, q + k);
    } else {
      fake_groups<element, kFloat32, false>((const char*)x, (char*)q, padded / format.group_size,
                                            format);
    }
  });
}

}  // namespace MB_ISA
}  // namespace mixbits
