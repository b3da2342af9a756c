// MXFP4 weights as 8-bit floats, and tokens that meet them.
//
// e2m1 times 2^k is a number of e4m3 for k = -8 .. 6, which is 15 powers: 0.5 * 2^-8 is e4m3's
// smallest number, and of 6 * 2^k the largest below its 448 is that of k = 6. So a row whose block
// scales lie within 15 binades is a row of e4m3 codes times one power of two, the row's scale, and
// nothing was rounded. k is the block's scale less the row's, both as e8m0 bytes. Which rows fit,
// and with which scale, says mixbits/formats/fp8_weights.py. e4m3 weights leave no room for this:
// their codes use all binades that e4m3 has.
#pragma once

#include "formats.h"

namespace mixbits {

constexpr int kFoldLowest = -8;

// The e4m3 codes of 2^k times e2m1's magnitudes 0, 0.5, 1, 1.5 (low) and 2, 3, 4, 6 (high), the
// first in the lowest byte.
struct FoldTable {
  uint32_t low, high;
};

// Any k may be asked for a block of zeros, whose codes use the lowest byte of `low` only.
MB_HD static inline constexpr FoldTable fold_table(int k) {
  k = k > kFoldLowest ? k : kFoldLowest;
  // From -5 on all but zero are normal numbers, and a binade is 8 codes. Below, the smallest are
  // subnormal, whose codes are halved from binade to binade.
  const uint32_t binades = uint32_t(k + 5);
  return {k >= -5 ? 0x14100800u + binades * 0x08080800u : 0x0c080400u >> (-6 - k),
          k > kFoldLowest ? 0x24201c18u + binades * 0x08080808u : 0x0c080604u};
}

static_assert(fold_table(0).low == 0x3c383000u && fold_table(0).high == 0x4c484440u,
              "0, 0.5, 1, 1.5 and 2, 3, 4, 6 as e4m3");

// A token becomes e4m3 codes of x * inverse, which are worth `scale` each.
struct TokenScale {
  float scale, inverse;
};

// `largest` are the bits of the token's largest magnitude. It becomes e4m3's largest number; below
// 2^-100, where the inverse would overflow, it becomes less. A token that is not finite is NaN.
MB_HD static inline TokenScale token_scale(int32_t largest) {
  if (largest >= 0x7f800000) return {bit_cast<float>(uint32_t(0x7fc00000)), 0.0f};
  constexpr int32_t kSmallest = (127 - 100) << 23;
  const float magnitude = bit_cast<float>(largest > kSmallest ? largest : kSmallest);
  return {magnitude / 448.0f, 448.0f / magnitude};
}

}  // namespace mixbits
