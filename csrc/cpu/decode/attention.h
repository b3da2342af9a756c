// Attention of one new token: the query heads that share a key head, over all keys and values.
//
// Keys and values are read once, a tile at a time, and become float32 in a buffer that stays in
// L1 while every query head meets it. Scores, their exponentials and the sums are float32.
#pragma once

#include "rows.h"

namespace mixbits {
namespace MB_ISA {

constexpr int kTile = 32;  // positions

// Shapes of one key head's attention.
struct Heads {
  int64_t group;   // query heads of a key head
  int64_t width;   // elements of a head
  int64_t length;  // positions
  int dtype;

  int64_t padded() const { return padded_lanes(width); }
  int64_t score_stride() const { return round_up(length, kTile); }
};

// Scores of a tile's `count` positions for one query head. Up to three more are nonsense.
static inline void score_tile(const float* query, const float* keys, int64_t padded, int count,
                              float* scores) {
  constexpr int kSide = 4;  // positions side by side
  for (int t = 0; t < count; t += kSide) {
    vf sums[kSide] = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
      const vf q = load(query + i);
      for (int s = 0; s < kSide; ++s) sums[s] = fma(q, load(keys + (t + s) * padded + i), sums[s]);
    }
    for (int s = 0; s < kSide; ++s) scores[t + s] = sum_lanes(sums[s]);
  }
}

// out += the sum of a tile's values, weighted, for SIDE vectors of elements.
template <int SIDE>
MB_INLINE void add_columns(const float* weights, const float* values, int64_t padded, int count,
                           float* out) {
  vf sums[SIDE];
  for (int s = 0; s < SIDE; ++s) sums[s] = load(out + s * kLanes);
  for (int t = 0; t < count; ++t) {
    const vf w = splat(weights[t]);
    for (int s = 0; s < SIDE; ++s)
      sums[s] = fma(w, load(values + t * padded + s * kLanes), sums[s]);
  }
  for (int s = 0; s < SIDE; ++s) store(out + s * kLanes, sums[s]);
}

static inline void add_tile(const float* weights, const float* values, int64_t padded, int count,
                            float* out) {
  constexpr int kSide = 4;
  int64_t i = 0;
  for (; i + kSide * kLanes <= padded; i += kSide * kLanes)
    add_columns<kSide>(weights, values + i, padded, count, out + i);
  for (; i < padded; i += kLanes) add_columns<1>(weights, values + i, padded, count, out + i);
}

// scores -> their exponentials; returns 1 / the sum of those. Behind `count` is memory for whole
// vectors.
static inline float softmax(float* scores, int64_t count) {
  for (int64_t i = count; i < padded_lanes(count); ++i) scores[i] = -__builtin_inff();
  vf top = load(scores), sums = {};
  for (int64_t i = kLanes; i < count; i += kLanes) {
    const vf x = load(scores + i);
    top = x > top ? x : top;
  }
  float largest = top[0];
  for (int l = 1; l < kLanes; ++l) largest = top[l] > largest ? top[l] : largest;
  for (int64_t i = 0; i < count; i += kLanes) {
    const vf e = exponential(load(scores + i) - largest);
    store(scores + i, e);
    sums += e;
  }
  return 1.0f / sum_lanes(sums);
}

// Calls f(first position, positions, the tile as float32) for all tiles of `rows`, which are keys
// or values [length, width].
template <class F>
MB_INLINE void for_tiles(const Heads& h, const char* rows, float* tile, const F& f) {
  const int64_t padded = h.padded(), bytes = h.width * dtype_bytes(h.dtype);
  for (int64_t first = 0; first < h.length; first += kTile) {
    const int count = int(min64(kTile, h.length - first));
    // The next tile is on its way while this one is used.
    const char* next = rows + (first + kTile) * bytes;
    const int64_t ahead = min64(kTile, h.length - first - kTile) * bytes;
    for (int64_t at = 0; at < ahead; at += 64) __builtin_prefetch(next + at);
    const int side = padded == h.width ? count : 1;  // rows without padding are one long row
    for (int t = 0; t < count; t += side)
      load_row(rows + (first + t) * bytes, side * h.width, h.dtype, tile + t * padded);
    f(first, count, tile);
  }
}

// queries [group, padded], scaled already, over keys and values [length, width] of dtype -> out
// [group, padded]. Buffers: tile [kTile, padded]; scores [group, score_stride].
static inline void attend(const Heads& h, const float* queries, const char* keys,
                          const char* values, float* tile, float* scores, float* out) {
  const int64_t padded = h.padded(), stride = h.score_stride();
  for_tiles(h, keys, tile, [&](int64_t first, int count, const float* k) {
    for (int64_t g = 0; g < h.group; ++g)
      score_tile(queries + g * padded, k, padded, count, scores + g * stride + first);
  });
  memset(out, 0, h.group * padded * sizeof(float));
  for (int64_t g = 0; g < h.group; ++g) {
    float* own = scores + g * stride;
    const vf scale = splat(softmax(own, h.length));
    for (int64_t i = 0; i < h.length; i += kLanes) store(own + i, load(own + i) * scale);
  }
  for_tiles(h, values, tile, [&](int64_t first, int count, const float* v) {
    for (int64_t g = 0; g < h.group; ++g)
      add_tile(scores + g * stride + first, v, padded, count, out + g * padded);
  });
}

}  // namespace MB_ISA
}  // namespace mixbits
