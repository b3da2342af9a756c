// What the ways to multiply packed weights share.
//
// A linear is one packed weight or several, its segments, each over a run of its columns. A path
// is one way to multiply a segment: how a token is prepared, and how rows of a weight are
// multiplied with all prepared tokens. matmul.cpp chooses a path per segment and call, prepares
// every token once per path and run of columns, and deals the rows of all linears out to the
// threads as items of work. An item adds up the products of all segments in float32, and rounds
// once.
//
//   path     tokens      activations                                     weights
//   float    1-4, any    float32                                         float32
//   dot      1-4         1 to 3 signed bytes per value, a scale per 32   unsigned bytes
//   bf16 dot 1-4         bfloat16                                        bfloat16 (e4m3, e5m2)
//   gemm     5 and up    int8, int16 or bfloat16                         the same
//   plain    1           float32                                         not packed, any dtype
//
// The order of additions depends on the path and the shape, and never on the number of threads.
#pragma once

#include "cpu/codes/group.h"
#include "cpu/kernels.h"

namespace mixbits {
namespace MB_ISA {

constexpr int kFewTokens = 4;
constexpr int kBlock = 32;  // columns that share an activation scale, in every path that has one

// A segment of a linear: its packed weight, and the format that its activations are rounded to.
struct SegmentWeight {
  PackedWeight weight;
  int64_t rows;
  int activation_code;
  Format activation;  // meaningful where activation_code is not 0

  int element() const { return weight.format.element; }
};

// The tokens of one call, or a chunk of them.
struct Input {
  const char* x;  // [count, columns] of dtype
  int64_t count, columns;
  int dtype;
};

// What a segment sees of them: `columns` of a row from number `first` on, once the row is in order
// and rotated.
struct Tokens {
  Input input;
  int64_t count, columns, first;
  const void* order;  // this and the next two as in Linear
  int order_bytes;
  bool rotated;
  int dtype;  // what values are rounded to: the sums of a rotation are float32

  // Token m as float32, filled up with zeros to whole vectors.
  void load(int64_t m, float* out) const;
  // Whether these are the same columns of one input.
  bool equals(const Tokens& other) const;
};

struct Path;

// A segment, the path that it takes, and tokens prepared for that.
struct Work {
  SegmentWeight segment;
  Tokens tokens;
  const Path* path;
  const char* prepared;  // [tokens, stride] bytes
  int64_t stride;
};

// Where products are added up: that of token m and row n at data[m * stride + n - first_row].
struct Sums {
  float* data;
  int64_t stride;
};
constexpr int kSumRows = 32;  // a path may write so many rows, counted from any multiple of it

struct Path {
  int64_t (*token_bytes)(const SegmentWeight& segment, int64_t columns);
  // Prepares token number m. False when this path cannot represent it; `floats` is a buffer for
  // padded_columns() of them.
  bool (*prepare)(const SegmentWeight& segment, const Tokens& tokens, int64_t m, float* floats,
                  char* out);
  int64_t (*scratch_bytes)(const SegmentWeight& segment,
                           const Tokens& tokens);  // for one call of multiply
  // Rows of an item; with more than a few tokens, also how many multiply takes at most.
  int64_t (*item_rows)(const SegmentWeight& segment, const Tokens& tokens);
  void (*multiply)(const Work& work, int64_t first_row, int64_t last_row, Sums sums, char* scratch);
};

// The float path does everything; the others return null for what they do not.
const Path* float_path(int64_t tokens);
const Path* integer_dot_path(const SegmentWeight& segment, const Tokens& tokens,
                             bool int8_activations);
const Path* bfloat16_dot_path(const SegmentWeight& segment, const Tokens& tokens);
const Path* gemm_path(const SegmentWeight& segment, const Tokens& tokens, bool int8_activations);
// For a weight [N, K] that was left alone: `codes` are its elements, of the tokens' dtype.
const Path* plain_path();

// --- linears as works and jobs ------------------------------------------------------------------

// Fills in a work, without prepared tokens, for every segment of a linear; returns their number.
int make_works(const Linear& linear, const Input& input, bool int8_activations, Work* works);
// The one of `count` works whose prepared tokens are what `work` needs, or null.
const Work* find_prepared(const Work* works, int count, const Work& work);

// A linear, in items of some rows.
struct Job {
  const Work* works;
  int work_count;
  void* out;  // [tokens, rows] of x's dtype
  int64_t item_rows, items;

  int64_t scratch_bytes() const;  // for one item
};

Job make_job(const Work* works, int count, void* out);
// Multiplies one of the items of all jobs, which are numbered in the order of the jobs.
void multiply_item(const Job* jobs, int64_t item, char* scratch);

// --- shared by paths --------------------------------------------------------------------------

MB_INLINE int64_t padded_columns(int64_t columns) { return round_up(columns, kRun) + kRun; }

// Token m as float32, fake-quantized where the segment wants it and rounded to its dtype, with
// zeros up to a whole run.
void float_token(const SegmentWeight& segment, const Tokens& tokens, int64_t m, float* out);

// Whether one of kLanes e8m0 bytes is 2^-127 or NaN, whose floats are no mere exponents.
MB_INLINE bool has_special_scale(vb bytes) {
#if defined(__AVX512F__)
  const __m128i next = _mm_add_epi8((__m128i)bytes, _mm_set1_epi8(1));
  return _mm_cmplt_epu8_mask(next, _mm_set1_epi8(2)) != 0;
#else
  (void)bytes;
  return true;
#endif
}

MB_INLINE vf e8m0_vector(vb bytes) {
  const vi byte = widen_bytes(bytes), bits = byte << 23;
  if (!has_special_scale(bytes)) return bit_cast<vf>(bits);
  const vi nan = byte == kNanScale, subnormal = splat_i(0x00400000);  // 2^-127
  return bit_cast<vf>(vi((bits > subnormal ? bits : subnormal) | (nan & subnormal)));
}

// kLanes scales as they are stored.
template <int ELEMENT>
MB_INLINE vf scale_vector(const uint8_t* bytes) {
  return is_mx(ELEMENT) ? e8m0_vector(load_raw<vb>(bytes))
                        : to_float(load_raw<vh>(bytes), kFloat16);
}

// The last scales of a row, fewer than kLanes; zeros beyond them.
template <int ELEMENT>
MB_INLINE vf last_scales(const uint8_t* bytes, int count) {
#if defined(__AVX512F__)
  const __mmask16 valid = __mmask16((1u << count) - 1);
  if (is_mx(ELEMENT)) {
    // Those that are not there are 1 at first: none is special.
    const __m128i one = _mm_set1_epi8(127);
    const vf all = e8m0_vector((vb)_mm_mask_loadu_epi8(one, valid, bytes));
    return (vf)_mm512_maskz_mov_ps(valid, (__m512)all);
  }
  return to_float((vh)_mm256_maskz_loadu_epi16(valid, bytes), kFloat16);
#else
  constexpr int size = scale_bytes(ELEMENT);
  uint8_t rest[kLanes * size] = {};
  memcpy(rest, bytes, count * size);
  vf all = scale_vector<ELEMENT>(rest);
  for (int j = count; j < kLanes; ++j) all[j] = 0;
  return all;
#endif
}

// Whether one of the first `count` bytes, a multiple of 8, has a sign or is NaN in e4m3.
MB_INLINE bool has_special_e4m3(const uint8_t* bytes, int64_t count) {
  uint64_t special = 0;
  for (int64_t i = 0; i < count; i += 8) {
    const uint64_t word = load_raw<uint64_t>(bytes + i);
    special |= word | (word + 0x0101010101010101u);
  }
  return special & 0x8080808080808080u;
}

// A row's scales in e4m3 over the tensor's divisor, with zeros up to a multiple of kLanes. Products
// can do with multiplying by its reciprocal: that rounds once more, as sums do at every addition.
static inline void decode_e4m3_scales(const PackedRow& row, int64_t count, float* out) {
  int64_t i = 0;
#if defined(__AVX2__)
  // As a float16, whose exponent is biased by 8 more, a byte is 2^8 times as small.
  const bool usual = row.divisor > 0x1p-60f && row.divisor < 0x1p60f;
  const vf factor = splat(0x1p8f / row.divisor);
  const int64_t whole = count / kLanes * kLanes;
  if (usual && !has_special_e4m3(row.scales, whole)) {
    for (; i < whole; i += kLanes) {
      const vh halves = widen_to_halves(load_raw<vb>(row.scales + i)) << 7;
      store(out + i, to_float(halves, kFloat16) * factor);
    }
  }
#endif
  for (; i < count; i += kLanes) {
    vb bytes = {};
    memcpy(&bytes, row.scales + i, min64(kLanes, count - i));
    const vf scale = minifloat_decode<vf, vi>(widen_bytes(bytes), minifloat(kE4M3));
    store(out + i, scale / row.divisor);
  }
  memset(out + count, 0, (round_up(count, kLanes) - count) * sizeof(float));
}

// A row's scales as floats, with zeros up to a multiple of kLanes.
template <int ELEMENT>
static void decode_scales(const PackedRow& row, int64_t count, float* out) {
  if constexpr (ELEMENT == kNVE2M1) return decode_e4m3_scales(row, count, out);
  constexpr int size = scale_bytes(ELEMENT);
  const uint8_t* const bytes = row.scales;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, scale_vector<ELEMENT>(bytes + i * size));
  if (i < count) store(out + i, last_scales<ELEMENT>(bytes + i * size, int(count - i)));
}

// What codes are counted from, per group: zero points, or half the range.
static inline void decode_offsets(const PackedRow& row, int64_t groups, int bits, int32_t* out) {
  for (int64_t g = 0; g < groups; ++g) {
    out[g] = row.zero_points ? unpack_code(row.zero_points, g, bits, groups) : 1 << (bits - 1);
  }
}

// The dot paths read at most this many rows side by side, and prefetch what lies so far ahead of
// them. One token meets two rows of 8-bit codes, which memory serves some 5 % faster than four;
// fewer bits are worth sharing a token's loads and the sums' latency among four.
constexpr int kMaxRows = 4;
constexpr int kAhead = 32 * 1024;
constexpr int rows_of_one_token(int bits) { return bits == 8 ? 2 : kMaxRows; }

// Prefetches the scales of rows as far ahead of row n as the dot paths prefetch codes. The hardware
// sees too few of them at a time to do it.
template <int ROWS>
MB_INLINE void prefetch_scales(const PackedWeight& weight, int64_t n) {
  const int64_t scales = weight.scale_row_bytes;
  const uint8_t* ahead = weight.row(n + ROWS + kAhead / weight.code_bytes).scales;
  for (int64_t at = 0; at < ROWS * scales; at += 64) __builtin_prefetch(ahead + at, 0, 2);
}

// Room for a row's scales, read a vector at a time from any group on.
static inline int64_t padded_groups(const SegmentWeight& segment) {
  return round_up(segment.weight.groups, kLanes) + kLanes;
}

// Rows of an item for few tokens: some 64 KB, so that threads of unequal speed end together.
static inline int64_t item_rows_of(int64_t row_bytes) {
  return round_up(64 * 1024 / row_bytes + 1, 4);
}
static inline int64_t dot_item_rows(const SegmentWeight& segment, const Tokens& tokens) {
  return item_rows_of(packed_bytes(tokens.columns, element_bits(segment.element())));
}

static inline int log2_of(int64_t power_of_two) { return __builtin_ctzll(power_of_two); }

}  // namespace MB_ISA
}  // namespace mixbits
