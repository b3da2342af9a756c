// The slow twins: every operation once more, one number at a time, in double, after the comments
// of csrc/formats.h.
#pragma once

#include <float.h>

#include <algorithm>

#include "support.h"

namespace mixbits {
namespace test {

// --- minifloats ---------------------------------------------------------------------------------

inline double decode_minifloat(int code, int element) {
  return double(minifloat_decode<float, int32_t>(code, minifloat(element)));
}

inline double largest_of(int element) {
  return double(bit_cast<float>(minifloat(element).max_value));
}

// The values of all magnitudes of an element, in order; those beyond the largest are no numbers.
inline const std::vector<double>& grid(int element) {
  static const std::vector<std::vector<double>> grids = [] {
    std::vector<std::vector<double>> all(kE2M3 + 1);
    for (const int e : {kE2M1, kE4M3, kE5M2, kE2M3}) {
      for (int code = 0; code < 1 << (element_bits(e) - 1); ++code) {
        if (decode_minifloat(code, e) <= largest_of(e)) all[e].push_back(decode_minifloat(code, e));
      }
    }
    return all;
  }();
  return grids[element];
}

// The code whose value is nearest to y, which is not NaN: a search through all magnitudes. In a
// tie the even code wins; beyond the largest, the largest.
inline int nearest_code(double y, int element) {
  const std::vector<double>& values = grid(element);
  int best = 0;
  double least = fabs(y);
  for (int code = 1; code < int(values.size()); ++code) {
    const double error = fabs(fabs(y) - values[code]);
    if (error < least || (error == least && code % 2 == 0)) {
      best = code;
      least = error;
    }
  }
  return signbit(y) ? best | 1 << (element_bits(element) - 1) : best;
}

// MXINT8 counts 1/64, from code 128 on.
inline int nearest_mxint8_code(double y) {
  return int(std::min(std::max(nearbyint(y * 64), -128.0), 127.0)) + 128;
}

// The e8m0 byte of a block whose largest magnitude is `largest`.
inline int slow_mx_scale(double largest, int element, int scale_mode) {
  if (!(largest <= FLT_MAX)) return kNanScale;
  int exponent = 0;
  const double mantissa = 2 * frexp(largest, &exponent);  // from 1 to 2
  int shared = exponent - 1 - minifloat(element).max_exponent;
  // As the exponent of the largest value is max_exponent, both are to be compared as mantissas.
  const double top = ldexp(largest_of(element), -minifloat(element).max_exponent);
  if (scale_mode == kRceil) shared += mantissa > top;
  // Of int8: from where on the nearest code would be 128.
  if (scale_mode == kEven) shared += mantissa >= (element == kMXInt8 ? 127.5 / 64 : 1.75);
  return largest == 0 || shared < -127 ? 0 : shared + 127;
}

inline double scale_value(int byte) { return byte == kNanScale ? NAN : ldexp(1.0, byte - 127); }

// --- groups -------------------------------------------------------------------------------------

struct SlowGroup {
  int stored_scale = 0, zero_point = 0;
  std::vector<int> codes;
};

inline SlowGroup slow_mx_group(const float* x, int64_t count, const Format& format) {
  SlowGroup group;
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double magnitude = fabs(double(x[i]));
    if (!(magnitude <= largest)) largest = magnitude;
    if (largest != largest) break;
  }
  group.stored_scale = slow_mx_scale(largest, format.element, format.scale_mode);
  const bool finite = group.stored_scale != kNanScale;
  const double scale = scale_value(group.stored_scale);
  for (int64_t i = 0; i < count; ++i) {
    const double y = double(x[i]) / scale;
    const int code = !finite                    ? 0
                     : is_float(format.element) ? nearest_code(y, format.element)
                                                : nearest_mxint8_code(y);
    group.codes.push_back(code);
  }
  return group;
}

// Scale and zero point come from formats.h; vector code has its own (csrc/cpu/codes/group.h).
inline SlowGroup slow_int_group(const float* x, int64_t count, const Format& format) {
  const int bits = element_bits(format.element);
  float low = 0, high = 0;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    finite = finite && isfinite(x[i]);
  }
  const IntGroup g = int_group(low, high, finite, bits, format.symmetric);
  SlowGroup group;
  group.stored_scale = g.scale_half;
  group.zero_point = int(g.offset);
  for (int64_t i = 0; i < count; ++i) {
    const int code = g.finite ? int(int_round<float>(x[i], g.scale, g.offset, bits)) : 0;
    group.codes.push_back(code);
  }
  return group;
}

// What is in formats.h, given the largest finite magnitude of the row or tensor.
inline float slow_span(const float* x, int64_t count, int element) {
  float largest = 0;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    if (isfinite(x[i])) largest = std::max(largest, fabsf(x[i]));
    finite = finite && isfinite(x[i]);
  }
  return span_of(has_row_scale(element) && !finite ? NAN : largest, element);
}

// The float that codes of an element that has_span are multiplied by.
inline float span_scale(int stored, int element, float divisor) {
  if (has_row_scale(element)) return bit_cast<float>(stored);
  return float(decode_minifloat(stored, kE4M3)) / divisor;
}

inline SlowGroup slow_span_group(const float* x, int64_t count, int element, float span) {
  SlowGroup group;
  float largest = 0;
  for (int64_t i = 0; i < count; ++i)
    largest = isfinite(x[i]) ? std::max(largest, fabsf(x[i])) : NAN;  // which is the larger then
  group.stored_scale =
      has_row_scale(element) ? bit_cast<int32_t>(span) : nv_scale<float, int32_t>(largest, span);
  const float scale = span_scale(group.stored_scale, element, span);
  for (int64_t i = 0; i < count; ++i) {
    const float y = x[i] / scale;  // rounded, as the definition has it
    const int code = isnan(scale) ? 0
                     : !is_float(element)
                         ? int(std::min(std::max(nearbyintf(y), -128.f), 127.f)) + 128
                         : nearest_code(y, element & 0x3f);
    group.codes.push_back(code);
  }
  return group;
}

inline SlowGroup slow_group(const float* x, int64_t count, const Format& format, float span) {
  if (has_span(format.element)) return slow_span_group(x, count, format.element, span);
  return is_mx(format.element) ? slow_mx_group(x, count, format) : slow_int_group(x, count, format);
}

// --- packed weights -----------------------------------------------------------------------------

// The value of a code; `scale` is as it is stored.
inline double code_value(int code, int scale, int zero_point, int element, float divisor = 1) {
  if (has_span(element)) {
    const double value = is_float(element) ? decode_minifloat(code, element) : code - 128;
    return value * double(span_scale(scale, element, divisor));
  }
  if (is_float(element)) return decode_minifloat(code, element) * scale_value(scale);
  if (element == kMXInt8) return double(code - 128) / 64 * scale_value(scale);
  return double(code - zero_point) * double(half_to_float(uint16_t(scale)));
}

inline void put_bits(uint8_t* plane, int64_t k, int bits, int code) {
  plane[k * bits / 8] = uint8_t(plane[k * bits / 8] | code << (k * bits % 8));
}

// Code number k of a row of `columns`: in one plane, or in two.
inline void put_code(uint8_t* row, int64_t columns, int64_t k, int bits, int code) {
  const int low = bits == 3 ? 2 : bits == 5 || bits == 6 ? 4 : bits;
  put_bits(row, k, low, code & ((1 << low) - 1));
  if (low < bits) put_bits(row + (columns * low + 7) / 8, k, bits - low, code >> low);
}

inline double weight_value(const Weight& w, int64_t n, int64_t k) {
  const Format format = decode_format(w.format);
  const int bits = element_bits(format.element);
  const int64_t g = k / w.group_columns();
  int32_t scale = 0;
  memcpy(&scale, w.scale_at(n, g), scale_bytes(format.element));
  int zero_point = 1 << (bits - 1);
  if (has_zero_points(w.format)) {
    zero_point =
        unpack_code(w.zero_points.data() + n * packed_bytes(w.groups(), bits), g, bits, w.groups());
  }
  const uint8_t* row = w.codes.data() + n * packed_bytes(w.columns, bits);
  const int code = unpack_code(row, k, bits, w.columns);
  return code_value(code, scale, zero_point, format.element, w.divisor);
}

inline Weight slow_pack(const std::vector<float>& x, int64_t rows, int64_t columns, int code) {
  const Format format = decode_format(code);
  const int bits = element_bits(format.element);
  Weight w(code, rows, columns, 0);
  w.codes.fill(0);
  w.zero_points.fill(0);
  if (format.element == kNVE2M1) w.divisor = slow_span(x.data(), rows * columns, kNVE2M1);
  for (int64_t n = 0; n < rows; ++n) {
    const float* const row_of_x = x.data() + n * columns;
    const bool by_row = has_row_scale(format.element);
    const float span = by_row ? slow_span(row_of_x, columns, format.element) : w.divisor;
    for (int64_t g = 0; g < w.groups(); ++g) {
      const int64_t first = g * w.group_columns();
      const int64_t count = std::min<int64_t>(w.group_columns(), columns - first);
      const SlowGroup group = slow_group(row_of_x + first, count, format, span);
      const int32_t scale = group.stored_scale;
      memcpy(w.scale_at(n, g), &scale, scale_bytes(format.element));
      uint8_t* row = w.codes.data() + n * packed_bytes(columns, bits);
      for (int64_t i = 0; i < count; ++i) put_code(row, columns, first + i, bits, group.codes[i]);
      if (!has_zero_points(code)) continue;
      put_code(w.zero_points.data() + n * packed_bytes(w.groups(), bits), w.groups(), g, bits,
               group.zero_point);
    }
  }
  return w;
}

// x [tokens, columns] in the order of a linear's columns, and rotated: sums of 32 in float32, round
// by round, as the kernels have them.
inline std::vector<float> slow_arranged(const Segments& s, const std::vector<float>& x) {
  const int64_t columns = s.columns(), tokens = int64_t(x.size()) / columns;
  std::vector<float> out(x.size());
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = out.data() + t * columns;
    for (int64_t i = 0; i < columns; ++i) row[i] = x[t * columns + s.column(i)];
    for (int64_t first = 0; s.rotated && first + 32 <= columns; first += 32) {
      for (int bit = 1; bit < 32; bit *= 2) {
        for (int i = 0; i < 32; ++i) {
          if (i & bit) continue;
          const float a = row[first + i], b = row[first + i + bit];
          row[first + i] = a + b;
          row[first + i + bit] = a - b;
        }
      }
    }
  }
  return out;
}

// Columns [first, first + count) of x [tokens, columns].
inline std::vector<float> columns_of(const std::vector<float>& x, int64_t columns, int64_t first,
                                     int64_t count) {
  std::vector<float> out;
  for (size_t row = 0; row < x.size(); row += size_t(columns)) {
    const auto begin = x.begin() + int64_t(row) + first;
    out.insert(out.end(), begin, begin + count);
  }
  return out;
}

inline std::vector<double> weight_values(const Weight& w) {
  std::vector<double> values(w.rows * w.columns);
  for (int64_t n = 0; n < w.rows; ++n) {
    for (int64_t k = 0; k < w.columns; ++k) values[n * w.columns + k] = weight_value(w, n, k);
  }
  return values;
}

// Rounded to float32, then to `dtype`.
inline Bytes slow_dequantize(const Weight& w, int dtype) {
  Bytes out(w.rows * w.columns * dtype_size(dtype));
  const std::vector<double> values = weight_values(w);
  for (size_t i = 0; i < values.size(); ++i) set(out, dtype, int64_t(i), float(values[i]));
  return out;
}

inline Bytes slow_fake_quantize(const std::vector<float>& x, int64_t rows, int64_t columns,
                                int dtype, int format) {
  return slow_dequantize(slow_pack(x, rows, columns, format), dtype);
}

// --- activations that become integers -----------------------------------------------------------

// Whether x that has no format may become integers beside weights of this element.
inline bool meets_integers(int element) { return element != kE4M3 && element != kE5M2; }

// By how much rounding may move each of a block's `count` values, as csrc/cpu/matmul/activations.h
// says: by half a step, or, where at most half of the values are large, by half a step of what
// rounding left, of which the largest is half a step itself.
inline double integer_error(const double* x, int64_t count, int dtype, bool int8) {
  double largest = 0;
  for (int64_t k = 0; k < count; ++k) largest = std::max(largest, fabs(x[k]));
  if (largest == 0) return 0;
  const int digits = dtype == kFloat32 ? 22 : 14;
  // Just below a power of two the step is that of the power.
  double step = ldexp(1.0, ilogb(largest * (2 / 1.984375)) - digits);
  double steps = dtype == kFloat32 ? 0x1p17 : dtype == kFloat16 ? 0x1p9 : 0x1p7;
  if (int8) {
    step = largest / 127;
    steps = 4;
  }
  int64_t large = 0;  // where rounding decides, the kernel may count one that lies just below
  for (int64_t k = 0; k < count; ++k) large += fabs(x[k]) >= steps * step * (1 - 1e-6);
  const double half = 1.01 * step / 2;
  return large > 16 ? half : half * (int8 ? 1.0 / 254 : ldexp(1.0, -digits - 1));
}

}  // namespace test
}  // namespace mixbits
