// Which columns of a packed row meet in which element of a tensor-core fragment.
//
// A matrix instruction adds products over 16 values of k and does not care which columns of the
// weight these are, as long as the weight and the activations agree. So the order is chosen for
// the weight as it lies in the file: a lane holds a chunk of adjacent columns of a row that is one
// load, 16 bytes of codes (8 of int2) for 32 columns (16 of the 8-bit elements), and lies in one
// group of every format. The four chunks of a quad are a tile, and as many steps of 16 values as
// it has. No weight is repacked.
//
// A chunk becomes pairs, 16-bit values in the halves of a register. The two codes of a pair are
// 16 bits apart in a word of codes, because then one shift and one mask extract both:
//
//   pair (w, i), i < codes / 2, of word w:  codes i and i + codes / 2 of the word's 32 / bits codes
//
// Step s takes pairs 2s and 2s + 1 of each lane: registers a0 (a1 of the row 8 below) and a2 (a3),
// b0 and b1 of the PTX manual's m16n8k16, whose layout wgmma's m64k16 in registers repeats per
// warp.
#pragma once

#include "layout.h"

namespace mixbits {
namespace cuda {

MB_HD static inline constexpr int chunk_columns(int bits) { return bits == 8 ? 16 : 32; }
MB_HD static inline constexpr int tile_columns(int bits) { return 4 * chunk_columns(bits); }
MB_HD static inline constexpr int chunk_words(int bits) { return chunk_columns(bits) * bits / 32; }

// The column within a chunk of `half` (0: low bits) of `pair`.
MB_HD static inline constexpr int pair_column(int bits, int pair, int half) {
  const int codes = 32 / bits, pairs = codes / 2;
  return pair / pairs * codes + pair % pairs + half * pairs;
}

// wgmma reads 64 values of k from one row of its operand in shared memory, 128 columns are two
// such rows: the position among the 128 values of a column.
constexpr int kPreparedColumns = 128;
MB_HD static inline constexpr int prepared_position(int bits, int column) {
  const int codes = 32 / bits, pairs = codes / 2, chunk = chunk_columns(bits);
  const int tile = column / tile_columns(bits), lane = column / chunk % 4;
  const int word = column % chunk / codes, code = column % codes;
  const int pair = word * pairs + code % pairs, half = code / pairs;
  return tile * tile_columns(bits) + pair / 2 * 16 + pair % 2 * 8 + lane * 2 + half;
}

// Prepared activations are [token block][128 columns][2][tokens of a block][64 values]: rows of
// 128 bytes whose eight 16-byte pieces are in wgmma's 128-byte swizzle, in which bits 4-6 of an
// address are xor-ed with bits 7-9. The byte of `position` within a block's 128 columns:
MB_HD static inline constexpr int prepared_byte(int block_tokens, int token, int position) {
  const int row = (position / 64 * block_tokens + token) * 128;
  const int piece = position % 64 / 8 ^ token % 8;
  return row + piece * 16 + position % 8 * 2;
}

// e2m1 folded to 8 bits (fold.h) goes in steps of 32 values, whose registers hold four each:
// step s takes word s of each lane's chunk, its codes 0-3 as a0 (a1 of the row 8 below) and 4-7 as
// a2 (a3) of the PTX manual's m16n8k32, which wgmma's m64k32 repeats. 128 values of a token are one
// row of 128 bytes, tokens follow each other, and the swizzle is the same.
MB_HD static inline constexpr int e4m3_position(int column) {
  const int lane = column / 32, step = column % 32 / 8, code = column % 8;
  return step * 32 + code / 4 * 16 + lane * 4 + code % 4;
}
MB_HD static inline constexpr int e4m3_byte(int token, int position) {
  return token * kPreparedColumns + (position / 16 ^ token % 8) * 16 + position % 16;
}

static_assert(pair_column(4, 0, 1) == 4 && pair_column(8, 1, 1) == 3 && pair_column(2, 9, 0) == 17,
              "pairs are 16 bits apart");
static_assert(prepared_position(4, 0) == 0 && prepared_position(4, 4) == 1 &&
                  prepared_position(4, 32) == 2 && prepared_position(8, 1) == 8,
              "the two elements of a pair are adjacent, then come the lanes");

}  // namespace cuda
}  // namespace mixbits
