// quantize_pack and dequantize: between float rows and the stored layout (layout.h).
#include <omp.h>

#include "group.h"
#include "kernels.h"
#include "ops.h"

namespace mixbits {
namespace MB_ISA {

// Code bytes -> packed bytes, the first code in the lowest bits; `codes` is zero beyond `count`,
// up to a multiple of four.
MB_INLINE void pack_codes(const uint8_t* codes, int64_t count, int bits, uint8_t* out) {
  const int64_t bytes = packed_bytes(count, bits);
  if (bits == 8) {
    memcpy(out, codes, bytes);
  } else if (bits == 4) {
    for (int64_t i = 0; i < bytes; ++i) out[i] = uint8_t(codes[2 * i] | codes[2 * i + 1] << 4);
  } else {
    for (int64_t i = 0; i < bytes; ++i) {
      const uint8_t* c = codes + 4 * i;
      out[i] = uint8_t(c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6);
    }
  }
}

template <int ELEMENT>
MB_INLINE void pack_row(const PackArgs& a, const Format format, int64_t row, uint8_t* zero_points) {
  constexpr int bits = element_bits(ELEMENT);
  const int size = dtype_bytes(a.dtype);
  const int64_t groups = group_count(a.columns, format.group_size);
  const char* in = static_cast<const char*>(a.weight) + row * a.columns * size;
  uint8_t* out = a.codes + row * packed_bytes(a.columns, bits);
  uint8_t* scales = a.scales + row * groups * scale_bytes(ELEMENT);
  int64_t g = 0;
  for (int64_t first = 0; first < a.columns; first += kRun) {
    const int count = int(min64(a.columns - first, kRun));
    alignas(64) float x[kRun];
    alignas(64) uint8_t codes[kRun];
    if (count < kRun) memset(x, 0, sizeof(x));
    load_row(in + first * size, count, a.dtype, x);
    for (int k = 0; k < count; k += format.group_size, ++g) {
      const GroupScale scale = encode_group<ELEMENT>(x + k, codes + k, format.group_size, format);
      memcpy(scales + g * scale_bytes(ELEMENT), &scale.scale, scale_bytes(ELEMENT));
      if (zero_points) zero_points[g] = scale.zero_point;
    }
    // Columns beyond the row's end were quantized from 0, which integers do not code as 0.
    for (int i = count; i % 4 != 0; ++i) codes[i] = 0;
    pack_codes(codes, count, bits, out + first * bits / 8);
  }
  if (zero_points) {
    for (int64_t i = groups; i % 4 != 0; ++i) zero_points[i] = 0;
    pack_codes(zero_points, groups, bits, a.zero_points + row * packed_bytes(groups, bits));
  }
}

bool quantize_pack(const PackArgs& a) {
  const Format format = decode_format(a.format);
  const int64_t groups = round_up(group_count(a.columns, format.group_size), 64);
  Scratch zero_points(a.zero_points ? groups * omp_get_max_threads() : 0);
  if (!zero_points.data) return false;
  const bool serial = a.rows * group_count(a.columns, kRun) <= kSerialRuns;
#pragma omp parallel for schedule(static) if (!serial)
  for (int64_t row = 0; row < a.rows; ++row) {
    uint8_t* buffer = zero_points.bytes() + groups * omp_get_thread_num();
    with_element(format.element, [&](auto tag) {
      pack_row<decltype(tag)::value>(a, format, row, a.zero_points ? buffer : nullptr);
    });
  }
  return true;
}

bool dequantize(const DequantizeArgs& a) {
  const Format format = decode_format(a.format);
  const PackedWeight weight = {a.codes, a.scales, a.zero_points, a.columns, format};
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
