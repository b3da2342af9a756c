// Where the bits of a packed [N, K] weight are. Written down here and in mixbits/formats/pack.py
// only.
//
//   codes        uint8 [N, ceil(K * bits / 8)]        code k at bit k * bits of its row, so the
//                                                     first column is in the lowest bits
//   scales       uint8 (e8m0) or float16 [N, groups]
//   zero points  uint8 [N, ceil(groups * bits / 8)]   asymmetric integers only, packed as codes
//
// Rows begin at a byte, and nothing is aligned to more than that. What is left of a row's last byte
// is zero.
#pragma once

#include "formats.h"

namespace mixbits {

MB_HD static inline constexpr int64_t packed_bytes(int64_t columns, int bits) {
  return (columns * bits + 7) / 8;
}
MB_HD static inline constexpr int64_t group_count(int64_t columns, int group_size) {
  return (columns + group_size - 1) / group_size;
}
MB_HD static inline constexpr int scale_bytes(int element) { return is_mx(element) ? 1 : 2; }

// Code number k of a packed row.
MB_HD static inline int unpack_code(const uint8_t* row, int64_t k, int bits) {
  const int64_t bit = k * bits;
  return (row[bit >> 3] >> (bit & 7)) & ((1 << bits) - 1);
}

static_assert(packed_bytes(31, 4) == 16 && packed_bytes(33, 2) == 9 && packed_bytes(7, 8) == 7,
              "a row of codes ends at a byte");
static_assert(group_count(172, 32) == 6 && group_count(172, 128) == 2 && group_count(0, 32) == 0,
              "the last group of a row may be short");
static_assert(128 % 8 == 0 && 32 * 2 % 8 == 0, "every group begins at a byte");

}  // namespace mixbits
