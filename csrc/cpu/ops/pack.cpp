// quantize_pack and dequantize: between float rows and the stored layout (layout.h).
#include <omp.h>

#include "cpu/codes/span.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"

namespace mixbits {
namespace MB_ISA {

// `bits` bits of codes, one byte each, from bit `shift` on, to a plane; the first in the lowest
// bits. `in` is zero beyond `count`, up to a multiple of eight.
static void pack_plane(const uint8_t* in, int64_t count, int shift, int bits, uint8_t* out) {
  const int per_byte = 8 / bits, mask = (1 << bits) - 1;
  for (int64_t i = 0; i < plane_bytes(count, bits); ++i) {
    int byte = 0;
    for (int j = 0; j < per_byte; ++j) byte |= (in[i * per_byte + j] >> shift & mask) << (j * bits);
    out[i] = uint8_t(byte);
  }
}

static void pack_zero_points(const uint8_t* in, int64_t count, int bits, uint8_t* out) {
  const int low = lower_bits(bits);
  pack_plane(in, count, 0, low, out);
  if (low < bits) pack_plane(in, count, low, bits - low, out + upper_plane(count, bits));
}

// Where the groups of one row go.
struct RowOut {
  Planes codes;
  uint8_t* scales;
  uint8_t* zero_points;  // one byte each, or null

  template <int ELEMENT>
  void put_scales(int64_t first, int groups, const Scales& from) const {
    for (int g = 0; g < groups; ++g) {
      memcpy(scales + (first + g) * scale_bytes(ELEMENT), from.stored + g, scale_bytes(ELEMENT));
      if (zero_points) zero_points[first + g] = uint8_t(from.offset[g]);
    }
  }
};

// The first `count` codes of a plane, which is zero beyond them.
static void copy_plane(uint8_t* from, int count, int bits, uint8_t* out) {
  const int bytes = int(plane_bytes(count, bits)), spare = bytes * 8 - count * bits;
  from[bytes - 1] &= uint8_t(0xff >> spare);
  memcpy(out, from, bytes);
}

// A group at the row's end, of `count` columns: as any other, filled with zeros, which however
// must not appear among the codes (integers do not code 0 as 0).
template <int ELEMENT, int DTYPE>
static void pack_rest(const char* x, Planes out, int count, const Format format, Scales* scales) {
  constexpr int bits = element_bits(ELEMENT), low = lower_bits(bits), size = dtype_bytes(DTYPE);
  alignas(64) char rest[kRun * size] = {};
  alignas(64) uint8_t lower[kRun], upper[kRun];
  memcpy(rest, x, count * size);
  pack_groups<ELEMENT, DTYPE>(rest, {lower, upper}, 1, format, scales);
  copy_plane(lower, count, low, out.lower);
  if (low < bits) copy_plane(upper, count, bits - low, out.upper);
}

template <int ELEMENT, int DTYPE>
static void pack_row(const char* x, int64_t columns, const Format format, const RowOut& out) {
  constexpr int bits = element_bits(ELEMENT), size = dtype_bytes(DTYPE);
  const int group = columns_of_group<ELEMENT>(format);
  const int64_t whole = columns / group;
  Scales scales;
  for (int64_t g = 0; g < whole; g += kBatch) {
    const int groups = int(min64(whole - g, kBatch));
    const int64_t k = g * group;
    pack_groups<ELEMENT, DTYPE>(x + k * size, out.codes.at(k, bits), groups, format, &scales);
    out.put_scales<ELEMENT>(g, groups, scales);
  }
  const int64_t k = whole * group;
  if (k < columns) {
    pack_rest<ELEMENT, DTYPE>(x + k * size, out.codes.at(k, bits), int(columns - k), format,
                              &scales);
    out.put_scales<ELEMENT>(whole, 1, scales);
  }
}

// Of an element that has_span: NVFP4's stored scales are a byte for a group, others four for a row.
template <int ELEMENT>
static void put_run_scales(const RunScales& from, int64_t first, int count, uint8_t* out) {
  if (has_row_scale(ELEMENT)) {
    memcpy(out, from.stored, 4);
    return;
  }
  for (int g = 0; g < group_count(count, 16); ++g) out[first / 16 + g] = uint8_t(from.stored[g]);
}

template <int ELEMENT>
static void pack_span_row(const PackArgs& a, int64_t row, float span) {
  constexpr int bits = element_bits(ELEMENT);
  const int64_t scales = scale_count(a.columns, decode_format(a.format)) * scale_bytes(ELEMENT);
  const char* x = static_cast<const char*>(a.weight) + row * a.columns * dtype_bytes(a.dtype);
  uint8_t* const codes = a.codes + row * packed_bytes(a.columns, bits);
  for (int64_t first = 0; first < a.columns; first += kRun) {
    alignas(64) float values[kRun];
    alignas(64) uint8_t plane[kRun];
    const int count = int(min64(a.columns - first, kRun));
    RunScales found;
    load_run(x, first, a.columns, a.dtype, values);
    pack_span_run<ELEMENT>(values, span, plane, &found);
    copy_plane(plane, count, bits, codes + first * bits / 8);
    put_run_scales<ELEMENT>(found, first, count, a.scales + row * scales);
  }
}

static bool pack_spans(const PackArgs& a, int element) {
  const Scratch spans(a.rows * sizeof(float));
  if (!spans.data) return false;
  find_spans(a.weight, a.rows, a.columns, a.dtype, &a.format, 1, spans.floats());
  if (a.divisor) memcpy(a.divisor, spans.data, sizeof(float));
  const bool serial = a.rows * group_count(a.columns, kRun) <= kSerialRuns;
#pragma omp parallel for schedule(static) if (!serial)
  for (int64_t row = 0; row < a.rows; ++row) {
    with_element(element, [&](auto tag) {
      constexpr int e = decltype(tag)::value;
      if constexpr (has_span(e)) pack_span_row<e>(a, row, spans.floats()[row]);
    });
  }
  return true;
}

bool quantize_pack(const PackArgs& a) {
  const Format format = decode_format(a.format);
  const int bits = element_bits(format.element);
  if (has_span(format.element)) return pack_spans(a, format.element);
  const int64_t groups = group_count(a.columns, format.group_size), stride = round_up(groups, 64);
  Scratch buffers(a.zero_points ? stride * omp_get_max_threads() : 0);
  if (!buffers.data) return false;
  const bool serial = a.rows * group_count(a.columns, kRun) <= kSerialRuns;
#pragma omp parallel for schedule(static) if (!serial)
  for (int64_t row = 0; row < a.rows; ++row) {
    uint8_t* points = a.zero_points ? buffers.bytes() + stride * omp_get_thread_num() : nullptr;
    uint8_t* const codes = a.codes + row * packed_bytes(a.columns, bits);
    const RowOut out = {{codes, codes + upper_plane(a.columns, bits)},
                        a.scales + row * groups * scale_bytes(format.element),
                        points};
    const char* x = static_cast<const char*>(a.weight) + row * a.columns * dtype_bytes(a.dtype);
    with_element(format.element, [&](auto element) {
      with_dtype(a.dtype, [&](auto dtype) {
        constexpr int e = decltype(element)::value, d = decltype(dtype)::value;
        if constexpr (!has_span(e)) pack_row<e, d>(x, a.columns, format, out);
      });
    });
    if (!points) continue;
    for (int64_t i = groups; i % 8 != 0; ++i) points[i] = 0;
    pack_zero_points(points, groups, bits, a.zero_points + row * packed_bytes(groups, bits));
  }
  return true;
}

bool dequantize(const DequantizeArgs& a) {
  const Format format = decode_format(a.format);
  const PackedWeight weight = {a.codes, a.scales, a.zero_points, a.divisor, a.columns, format};
  const int size = dtype_bytes(a.dtype);
  const bool serial = a.rows * group_count(a.columns, kRun) <= kSerialRuns;
#pragma omp parallel for schedule(static) if (!serial)
  for (int64_t n = 0; n < a.rows; ++n) {
    const PackedRow row = weight.row(n);
    char* out = static_cast<char*>(a.out) + n * a.columns * size;
    with_element(format.element, [&](auto tag) {
      for (int64_t first = 0; first < a.columns; first += kRun) {
        const int count = int(min64(a.columns - first, kRun));
        alignas(64) float values[kRun];
        decode_run<decltype(tag)::value>(row, format.group_size, first, count, values);
        store_row(values, count, a.dtype, out + first * size);
      }
    });
  }
  return true;
}

}  // namespace MB_ISA
}  // namespace mixbits
