// What the native tests and the fuzz target share: random numbers, memory of exact size, and
// tensors in it.
#pragma once

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "formats.h"
#include "layout.h"

namespace mixbits {
namespace test {

// --- random numbers -----------------------------------------------------------------------------

// splitmix64: a seed gives the same numbers everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int below(int64_t bound) { return int(bits() % uint64_t(bound)); }
  int between(int low, int high) { return low + below(high - low + 1); }
  double unit() { return double(bits() >> 11) * 0x1p-53; }
  // Nearly normal: the sum of four uniform numbers, with variance 1.
  float normal() { return float((unit() + unit() + unit() + unit() - 2) * 1.7320508); }
  template <class C>
  auto choice(const C& from) {
    return from[below(int64_t(from.size()))];
  }

 private:
  uint64_t state_;
};

// --- memory -------------------------------------------------------------------------------------

// Exactly `size` bytes, which begin `shift` bytes behind an aligned address and end where the
// allocation does, so that AddressSanitizer sees the first byte read or written beyond them.
class Bytes {
 public:
  Bytes() : Bytes(0) {}
  explicit Bytes(int64_t size, int shift = 0)
      : start_(static_cast<uint8_t*>(malloc(size_t(size + shift)))), size_(size), shift_(shift) {
    if (!start_ && size + shift > 0) abort();
  }
  Bytes(Bytes&& other) : Bytes() { *this = std::move(other); }
  Bytes& operator=(Bytes&& other) {
    std::swap(start_, other.start_);
    std::swap(size_, other.size_);
    std::swap(shift_, other.shift_);
    return *this;
  }
  ~Bytes() { free(start_); }

  uint8_t* data() const { return start_ + shift_; }
  int64_t size() const { return size_; }
  void fill(uint8_t value) const {
    if (size_ > 0) memset(data(), value, size_t(size_));
  }
  bool equals(const Bytes& other) const {
    return size_ == other.size_ && (size_ == 0 || memcmp(data(), other.data(), size_) == 0);
  }

 private:
  uint8_t* start_;
  int64_t size_;
  int shift_;
};

// --- tensors ------------------------------------------------------------------------------------

inline int dtype_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }

inline float get(const Bytes& tensor, int dtype, int64_t at) {
  uint32_t word = 0;
  memcpy(&word, tensor.data() + at * dtype_size(dtype), dtype_size(dtype));
  if (dtype == kFloat32) return bit_cast<float>(word);
  return dtype == kBFloat16 ? bfloat16_to_float(uint16_t(word)) : half_to_float(uint16_t(word));
}

inline void set(const Bytes& tensor, int dtype, int64_t at, float value) {
  uint32_t word = bit_cast<uint32_t>(value);
  if (dtype != kFloat32)
    word = dtype == kBFloat16 ? float_to_bfloat16(value) : float_to_half(value);
  memcpy(tensor.data() + at * dtype_size(dtype), &word, dtype_size(dtype));
}

inline float round_to(int dtype, float value) {
  if (dtype == kBFloat16) return bfloat16_to_float(float_to_bfloat16(value));
  return dtype == kFloat16 ? half_to_float(float_to_half(value)) : value;
}

inline std::vector<float> to_floats(const Bytes& tensor, int dtype) {
  std::vector<float> out(tensor.size() / dtype_size(dtype));
  for (size_t i = 0; i < out.size(); ++i) out[i] = get(tensor, dtype, int64_t(i));
  return out;
}

// Equal to the bit, zeros' signs included; any NaN equals any NaN. Otherwise where they differ.
inline int64_t first_difference(const Bytes& a, const Bytes& b, int dtype) {
  const int64_t count = a.size() / dtype_size(dtype);
  if (a.size() != b.size()) return 0;
  for (int64_t i = 0; i < count; ++i) {
    const float x = get(a, dtype, i), y = get(b, dtype, i);
    const bool same = bit_cast<uint32_t>(x) == bit_cast<uint32_t>(y) || (x != x && y != y);
    if (!same) return i;
  }
  return -1;
}

// --- formats ------------------------------------------------------------------------------------

inline int format_code(int element, int group_size, bool symmetric, int scale_mode) {
  const int scale = is_mx(element) ? 0 : element == kNVE2M1 ? 2 : has_row_scale(element) ? 3 : 1;
  element &= 0x3f;
  return element | scale_mode << 8 | int(symmetric) << 12 | scale << 13 | group_size << 16;
}

inline const char* element_name(int element) {
  static const char* const names[] = {"e2m1", "e4m3", "e5m2", "int2", "int4",
                                      "int8", "e2m3", "int3", "int5", "int6"};
  return element == kMXInt8    ? "mxint8"
         : element == kNVE2M1  ? "nvfp4"
         : element == kRowE4M3 ? "fp8"
         : element == kRowInt8 ? "int8 rows"
                               : names[element];
}

inline std::vector<int> mx_formats() {
  std::vector<int> codes;
  for (const int element : {kE2M1, kE4M3, kE5M2, kE2M3, kMXInt8}) {
    for (int mode = kFloor; mode <= kEven; ++mode)
      codes.push_back(format_code(element, 32, true, mode));
  }
  return codes;
}

inline std::vector<int> int_formats() {
  std::vector<int> codes;
  for (const int element : {kInt2, kInt4, kInt8, kInt3, kInt5, kInt6}) {
    for (int group = 32; group <= 128; group *= 2) {
      codes.push_back(format_code(element, group, true, kFloor));
      codes.push_back(format_code(element, group, false, kFloor));
    }
  }
  return codes;
}

inline std::vector<int> all_formats() {
  std::vector<int> codes = mx_formats();
  for (const int code : int_formats()) codes.push_back(code);
  return codes;
}

// Those whose scales follow from the largest magnitude of a whole row or tensor.
inline std::vector<int> span_formats() {
  return {format_code(kNVE2M1, 16, true, kFloor), format_code(kRowE4M3, 0, true, kFloor),
          format_code(kRowInt8, 0, true, kFloor)};
}

inline std::vector<int> formats_of_weights() {
  std::vector<int> codes = all_formats();
  for (const int code : span_formats()) codes.push_back(code);
  return codes;
}

inline bool has_zero_points(int format) {
  return !is_mx(decode_format(format).element) && !decode_format(format).symmetric;
}

// --- packed weights -----------------------------------------------------------------------------

struct Weight {
  int format = 0;
  int64_t rows = 0, columns = 0;
  Bytes codes, scales, zero_points;
  float divisor = 1;  // of NVFP4's scales

  Weight() = default;
  Weight(int code, int64_t n, int64_t k, int shift) : format(code), rows(n), columns(k) {
    const int element = decode_format(code).element, bits = element_bits(element);
    codes = Bytes(n * packed_bytes(k, bits), shift);
    scales = Bytes(n * groups() * scale_bytes(element), shift);
    if (has_zero_points(code)) zero_points = Bytes(n * packed_bytes(groups(), bits), shift);
  }

  int64_t groups() const { return scale_count(columns, decode_format(format)); }
  int64_t group_columns() const {
    const Format own = decode_format(format);
    return has_row_scale(own.element) ? columns : own.group_size;
  }
  uint8_t* zero_points_or_null() const {
    return has_zero_points(format) ? zero_points.data() : nullptr;
  }
  // Where a group's scale is.
  uint8_t* scale_at(int64_t n, int64_t group) const {
    return scales.data() + (n * groups() + group) * scale_bytes(decode_format(format).element);
  }
  bool equals(const Weight& other) const {
    return codes.equals(other.codes) && scales.equals(other.scales) &&
           zero_points.equals(other.zero_points) && divisor == other.divisor;
  }
};

// What a Linear points to: segments side by side.
struct Segments {
  std::vector<Weight> weights;
  std::vector<int> activations;  // per weight
  Bytes order;                   // empty for the natural one
  int order_bytes = 0;
  bool rotated = false;

  int64_t rows() const { return weights[0].rows; }
  int64_t columns() const {
    int64_t sum = 0;
    for (const Weight& w : weights) sum += w.columns;
    return sum;
  }
  int64_t column(int64_t place) const {
    if (!order_bytes) return place;
    uint32_t entry = 0;
    memcpy(&entry, order.data() + place * order_bytes, size_t(order_bytes));
    return entry;
  }
  // The result points into `list`.
  Linear get(std::vector<PackedSegment>* list) const {
    list->clear();
    for (size_t i = 0; i < weights.size(); ++i) {
      const Weight& w = weights[i];
      list->push_back({w.codes.data(), w.scales.data(), w.zero_points_or_null(), w.columns,
                       w.format, activations[i]});
    }
    return {list->data(), int(list->size()), order_bytes ? order.data() : nullptr,
            order_bytes,  rotated,           rows()};
  }
};

// A random order of all columns, or none, and a rotation, or none; `random(bound)` is below bound.
template <class R>
void arrange(Segments* s, const R& random) {
  const int64_t columns = s->columns();
  s->rotated = random(2);
  if (random(4) == 0) return;
  s->order_bytes = columns <= 256 && random(2) ? 1 : random(2) ? 2 : 4;
  s->order = Bytes(columns * s->order_bytes, random(2));
  std::vector<uint32_t> order(columns);
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t other = random(int(i + 1));
    order[i] = order[other];
    order[other] = uint32_t(i);
  }
  for (int64_t i = 0; i < columns; ++i)
    memcpy(s->order.data() + i * s->order_bytes, &order[i], size_t(s->order_bytes));
}

// --- operations ---------------------------------------------------------------------------------

inline std::vector<const char*> isa_names() {
  std::vector<const char*> names;
  while (const char* name = isa_name(int(names.size()))) names.push_back(name);
  return names;
}

inline bool run_fake_quantize(const Bytes& x, const Bytes& out, int64_t rows, int64_t columns,
                              int dtype, int format) {
  return kernels().fake_quantize({x.data(), out.data(), rows, columns, dtype, format});
}

inline bool run_quantize_pack(const Bytes& x, Weight& out, int dtype) {
  const bool divided = decode_format(out.format).element == kNVE2M1;
  return kernels().quantize_pack({x.data(), out.codes.data(), out.scales.data(),
                                  out.zero_points_or_null(), out.rows, out.columns, dtype,
                                  out.format, divided ? &out.divisor : nullptr});
}

inline bool run_dequantize(const Weight& weight, const Bytes& out, int dtype) {
  return kernels().dequantize({weight.codes.data(), weight.scales.data(),
                               weight.zero_points_or_null(), out.data(), weight.rows,
                               weight.columns, dtype, weight.format, &weight.divisor});
}

struct Matmul {
  Bytes x;
  int64_t tokens = 0, columns = 0;
  int dtype = kFloat32;
  bool int8_activations = false;
  std::vector<Weight> weights;
  std::vector<int> activations;  // per weight

  // Outputs of the weights [first, last), in memory filled with `pattern` before; empty if it says
  // that memory ran out.
  std::vector<Bytes> run(int threads, uint8_t pattern, size_t first, size_t last) const {
    omp_set_num_threads(threads);
    std::vector<Bytes> outs;
    std::vector<MatmulTarget> targets;
    std::vector<PackedSegment> segments(weights.size());
    for (size_t i = first; i < last; ++i) {
      const Weight& w = weights[i];
      outs.emplace_back(tokens * w.rows * dtype_size(dtype), pattern & 1);
      outs.back().fill(pattern);
      segments[i] = {w.codes.data(), w.scales.data(), w.zero_points_or_null(),
                     columns,        w.format,        activations[i]};
      targets.push_back({{&segments[i], 1, nullptr, 0, false, w.rows}, outs.back().data()});
    }
    const bool ok = kernels().packed_matmul(
        {x.data(), targets.data(), tokens, columns, dtype, int(targets.size()), int8_activations});
    if (!ok) outs.clear();
    return outs;
  }
  std::vector<Bytes> run(int threads, uint8_t pattern) const {
    return run(threads, pattern, 0, weights.size());
  }
};

// The same with linears of several segments.
struct Mixes {
  Bytes x;
  int64_t tokens = 0, columns = 0;
  int dtype = kFloat32;
  bool int8_activations = false;
  std::vector<Segments> linears;

  std::vector<Bytes> run(int threads, uint8_t pattern, size_t first, size_t last) const {
    omp_set_num_threads(threads);
    std::vector<Bytes> outs;
    std::vector<MatmulTarget> targets;
    std::vector<std::vector<PackedSegment>> lists(linears.size());
    for (size_t i = first; i < last; ++i) {
      outs.emplace_back(tokens * linears[i].rows() * dtype_size(dtype), pattern & 1);
      outs.back().fill(pattern);
      targets.push_back({linears[i].get(&lists[i]), outs.back().data()});
    }
    const bool ok = kernels().packed_matmul(
        {x.data(), targets.data(), tokens, columns, dtype, int(targets.size()), int8_activations});
    if (!ok) outs.clear();
    return outs;
  }
  std::vector<Bytes> run(int threads, uint8_t pattern) const {
    return run(threads, pattern, 0, linears.size());
  }
};

}  // namespace test
}  // namespace mixbits
