// Where the bits of a packed [N, K] weight are. Written down here and in mixbits/formats/pack.py
// only.
//
//   codes        uint8 [N, ceil(K * bits / 8)]        code k at bit k * bits of its row, so the
//                                                     first column is in the lowest bits
//   scales       uint8 (e8m0, e4m3), float16 or float32 [N, groups]
//   zero points  uint8 [N, ceil(groups * bits / 8)]   asymmetric integers only, packed as codes
//
// Codes of 3, 5 and 6 bits lie in two planes, one behind the other in each row: the lower 2 or 4
// bits of all of its codes, as if they were codes of that many bits, then the upper 1 or 2 bits.
//
// Rows and planes begin at a byte, and nothing is aligned to more than that. What is left of a
// plane's last byte is zero.
#pragma once

#include "formats.h"

namespace mixbits {

// How many of a code's bits lie in the first plane; the others, if any, are in the second.
MB_HD static inline constexpr int lower_bits(int bits) {
  return bits == 3 ? 2 : bits == 5 || bits == 6 ? 4 : bits;
}
MB_HD static inline constexpr int64_t plane_bytes(int64_t columns, int bits) {
  return (columns * bits + 7) / 8;
}
// Where a row's second plane begins.
MB_HD static inline constexpr int64_t upper_plane(int64_t columns, int bits) {
  return plane_bytes(columns, lower_bits(bits));
}
MB_HD static inline constexpr int64_t packed_bytes(int64_t columns, int bits) {
  return upper_plane(columns, bits) + plane_bytes(columns, bits - lower_bits(bits));
}
MB_HD static inline constexpr int64_t group_count(int64_t columns, int group_size) {
  return (columns + group_size - 1) / group_size;
}
MB_HD static inline constexpr int scale_bytes(int element) {
  return has_row_scale(element) ? 4 : is_mx(element) || is_float(element) ? 1 : 2;
}
MB_HD static inline constexpr int64_t scale_count(int64_t columns, const Format& format) {
  return has_row_scale(format.element) ? 1 : group_count(columns, format.group_size);
}

// Code number k of a plane, which is a packed row of 1, 2, 4 or 8 bits.
MB_HD static inline int unpack_code(const uint8_t* row, int64_t k, int bits) {
  const int64_t bit = k * bits;
  return (row[bit >> 3] >> (bit & 7)) & ((1 << bits) - 1);
}
// Code number k of a packed row of `columns` codes.
MB_HD static inline int unpack_code(const uint8_t* row, int64_t k, int bits, int64_t columns) {
  const int low = lower_bits(bits), code = unpack_code(row, k, low);
  if (low == bits) return code;
  return code | unpack_code(row + upper_plane(columns, bits), k, bits - low) << low;
}

static_assert(packed_bytes(31, 4) == 16 && packed_bytes(33, 2) == 9 && packed_bytes(7, 8) == 7,
              "a row of codes ends at a byte");
static_assert(packed_bytes(31, 3) == 8 + 4 && packed_bytes(33, 5) == 17 + 5 &&
                  packed_bytes(7, 6) == 4 + 2,
              "so does each of its planes");
static_assert(group_count(172, 32) == 6 && group_count(172, 128) == 2 && group_count(0, 32) == 0,
              "the last group of a row may be short");
static_assert(32 * 1 % 8 == 0, "every group begins at a byte of each plane");

}  // namespace mixbits
