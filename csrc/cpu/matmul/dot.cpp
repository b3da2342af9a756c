// The dot path of packed_matmul: few tokens, integer weights, at the speed of memory.
//
// Rows are read as they are stored, kRows of them side by side, and every byte is used for all
// tokens while it is in a register. A step is one vector of packed bytes of a row:
//
//   4-bit codes, 512-bit vectors: 128 columns, 4 blocks of 32
//
//     byte j      columns 2j (low half, plane 0) and 2j + 1 (high half, plane 1)
//     lane l      bytes 4l .. 4l+3 of both planes, so columns 8l .. 8l+7, all in block l / 4
//
// A plane of unsigned weights meets the same columns of an activation's signed bytes in one
// vpdpbusd (AVX2: vpmaddubsw, vpmaddwd), which adds without rounding; only a lane's sum over a
// step becomes a float and meets the scales. With 8 / bits planes the same holds for 2 and 8
// bits: a lane has 32 / bits columns, and a block `bits` lanes. Codes of 3, 5 and 6 bits go by
// their lower 2 or 4: the upper ones, which lie behind them in the row, join them in registers.
//
// Weights are unsigned: e2m1 as 2w + 12, e2m3 as 8w + 60, integers as their codes. The sum
// therefore begins with -offset times the sum of the activations that a lane meets, prepared once
// per token.
#include "activations.h"

namespace mixbits {
namespace MB_ISA {

#if !defined(__AVX2__)

const Path* integer_dot_path(const SegmentWeight&, const Tokens&, bool) { return nullptr; }

#else

namespace {

constexpr int kVector = kLanes * 4;  // bytes

// Bits of a code in the bytes of a step, by which BITS is meant below.
template <int ELEMENT>
constexpr int step_bits() {
  return lower_bits(element_bits(ELEMENT));
}

template <int BITS, int PIECES>
struct Step {
  static constexpr int kPlanes = 8 / BITS;
  static constexpr int kColumns = kVector * kPlanes;
  int8_t plane[PIECES][kPlanes][kVector];
  // What the sums begin with: of all pieces but the third, and of the third.
  int32_t start[PIECES == 3 ? 2 : 1][kLanes];
  float scale[kLanes];  // of the lane's block; 0 beyond the last
};

template <int BITS>
constexpr int step_columns() {
  return Step<BITS, 1>::kColumns;
}

// --- tokens -------------------------------------------------------------------------------------

// The lanes' sums of one piece.
template <int PLANES>
MB_INLINE vi sum_plane(const int8_t (*plane)[kVector]) {
  const vi ones = splat_i(0x01010101);
  vi sum = {};
  for (int p = 0; p < PLANES; ++p) sum = dot_bytes(sum, ones, load_raw<vi>(plane[p]));
  return sum;
}

// The integers of some blocks. Where they are a term, x keeps what others must add.
template <int BITS, int PIECES>
static Fit prepare_step(float* x, int blocks, Integers kind, const SegmentWeight& segment,
                        int dtype, Step<BITS, PIECES>* out) {
  constexpr int planes = 8 / BITS, columns = step_columns<BITS>();
  alignas(64) int8_t natural[PIECES][columns] = {};
  const float weight_scale = integer_unit(segment.element());
  memset(out->scale, 0, sizeof(out->scale));
  Fit fits[columns / kBlock], fit = kEnough;
  for (int b = 0; b < blocks; ++b) {
    alignas(64) int32_t values[kBlock];
    float scale;
    fits[b] = integer_block(x + b * kBlock, kind, segment.activation, dtype, values, &scale);
    fit = fits[b] > fit ? fits[b] : fit;
    split_pieces<PIECES>(values, columns, natural[0] + b * kBlock);
    for (int i = 0; i < BITS; ++i) out->scale[b * BITS + i] = scale * weight_scale;
  }
  vi sums[PIECES];
  for (int piece = 0; piece < PIECES; ++piece) {
    for (int p = 0; p < planes; ++p) {
      for (int j = 0; j < kVector; ++j) out->plane[piece][p][j] = natural[piece][planes * j + p];
    }
    sums[piece] = sum_plane<planes>(out->plane[piece]);
  }
  const int32_t offset = segment.weight.zero_points ? -1 : -code_offset(segment.element());
  const vi first = PIECES == 1 ? sums[0] : vi((sums[0] << 8) + sums[PIECES == 1 ? 0 : 1]);
  store_raw(out->start[0], vi(first * offset));
  if (PIECES == 3) store_raw(out->start[PIECES == 3 ? 1 : 0], vi(sums[PIECES - 1] * offset));
  for (int b = 0; b < blocks && fit == kTerm; ++b) {
    if (fits[b] == kEnough) memset(x + b * kBlock, 0, kBlock * sizeof(float));
  }
  return fit;
}

// A prepared token: a step for every run of columns, then further terms, which are as many steps
// at most, their number, and the step that each is added to.
template <int BITS, int PIECES>
struct Token {
  using S = Step<BITS, PIECES>;
  S *const steps, *const terms;
  int32_t *const term_count, *const step_of;

  Token(const char* p, int64_t columns)
      : steps(reinterpret_cast<S*>(const_cast<char*>(p))),
        terms(steps + count(columns)),
        term_count(reinterpret_cast<int32_t*>(terms + count(columns))),
        step_of(term_count + 1) {}
  static int64_t count(int64_t columns) { return group_count(columns, step_columns<BITS>()); }
  static int64_t bytes(int64_t columns) {
    const int64_t n = count(columns);  // vectors of the next token begin on a cache line again
    return round_up(2 * n * int64_t(sizeof(S)) + (n + 1) * int64_t(sizeof(int32_t)), 64);
  }
};

template <int BITS, int PIECES, int KIND>
bool prepare(const SegmentWeight& segment, const Tokens& tokens, int64_t m, float* floats,
             char* out) {
  constexpr int columns = step_columns<BITS>();
  tokens.load(m, floats);
  const Token<BITS, PIECES> token(out, tokens.columns);
  const int64_t count = token.count(tokens.columns);
  memset(floats + tokens.columns, 0, (count * columns - tokens.columns) * sizeof(float));
  int32_t terms = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int blocks = int(group_count(min64(tokens.columns - i * columns, columns), kBlock));
    for (auto* step = token.steps + i;; step = token.terms + terms++) {
      const Fit fit =
          prepare_step(floats + i * columns, blocks, Integers(KIND), segment, tokens.dtype, step);
      if (fit == kEnough) break;
      if (fit == kUnfit || terms == count) return false;
      token.step_of[terms] = int32_t(i);
    }
  }
  *token.term_count = terms;
  return true;
}

template <int BITS, int PIECES>
int64_t token_bytes(const SegmentWeight&, int64_t columns) {
  return Token<BITS, PIECES>::bytes(columns);
}

// --- weights ------------------------------------------------------------------------------------

// e2m1 codes in the low halves of bytes -> 2w + 12. With VBMI what is in the high halves does not
// matter, as the table has 64 entries and may repeat itself.
MB_INLINE vi look_up_e2m1(vi codes) {
  const __m128i table = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
#if defined(__AVX512VBMI__)
  return (vi)_mm512_permutexvar_epi8((__m512i)codes, _mm512_broadcast_i32x4(table));
#else
  return look_up(codes & 0x0f0f0f0f, table);
#endif
}

// The lower four bits of e2m3 codes -> 8w + 60, given the fifth and the sign in the top bits of
// bytes: without the fifth, they are 8w.
MB_INLINE vi look_up_e2m3(vi lower, vi fifth, vi sign) {
  const __m128i table =
      _mm_setr_epi8(16, 18, 20, 22, 24, 26, 28, 30, 32, 36, 40, 44, 48, 52, 56, 60);
  const v_bytes magnitude = (v_bytes)select_bytes(fifth, look_up(lower, table), lower);
  return select_bytes(sign, (vi)(60 - magnitude), (vi)(60 + magnitude));
}

// Packed bytes, and where those of the second plane are -> unsigned weights, one vector per plane.
template <int ELEMENT>
MB_INLINE void split_planes(vi bytes, const uint8_t* upper, vi* plane) {
  constexpr int bits = element_bits(ELEMENT);
  constexpr int32_t mask = int32_t(0x01010101u * ((1u << bits) - 1));
  if constexpr (ELEMENT == kE2M3) {
    const vi above = spread_nibbles(upper) << 4;  // fifths in bits 4 and 6 of a byte, then signs
    plane[0] = look_up_e2m3(bytes & 0x0f0f0f0f, above << 3, above << 2);
    plane[1] = look_up_e2m3(bytes >> 4 & 0x0f0f0f0f, above << 1, above);
  } else if constexpr (bits != step_bits<ELEMENT>()) {
    join_planes<bits>(bytes, upper, plane);
  } else {
    for (int p = 0; p < 8 / bits; ++p) {
      const vi shifted = p == 0 ? bytes : vi(bytes >> (bits * p));
      plane[p] = is_float(ELEMENT) ? look_up_e2m1(shifted) : bits == 8 ? bytes : vi(shifted & mask);
    }
  }
}

// Bytes of a step in the second plane of a row, where there is one.
template <int ELEMENT>
constexpr int upper_bytes() {
  return kVector * (element_bits(ELEMENT) - step_bits<ELEMENT>()) / step_bits<ELEMENT>();
}

// The last step of some rows, if it is not whole, filled up with zeros.
template <int R>
struct Tail {
  alignas(64) uint8_t codes[R][kVector] = {};
  uint8_t upper[R][kVector / 2] = {};
};

// Some rows side by side: where a step of the first row is, and how far the next row is from it.
struct Rows {
  const uint8_t *codes, *upper;  // in the first plane and in the second
  int64_t code_stride, upper_stride;
  const float* scales;     // per group, readable to a whole vector beyond the last
  const int32_t* offsets;  // likewise
  int64_t group_stride;

  // The same rows `steps` later.
  template <int ELEMENT>
  MB_METHOD Rows after(int64_t steps) const {
    Rows later = *this;
    later.codes += steps * kVector;
    later.upper += steps * upper_bytes<ELEMENT>();
    return later;
  }
  template <int R>
  MB_METHOD Rows at(const Tail<R>& tail) const {
    return {tail.codes[0], tail.upper[0], kVector, kVector / 2, scales, offsets, group_stride};
  }
};

// Where the groups of a step's lanes are: at `first(step)` plus the lane's entry of `spread`.
template <int BITS>
struct Groups {
  vi spread;
  int log2_size;

  explicit Groups(int group_size) : log2_size(log2_of(group_size)) {
    int32_t lanes[kLanes];
    for (int l = 0; l < kLanes; ++l) lanes[l] = (l * (32 / BITS)) >> log2_size;
    spread = load_raw<vi>(lanes);
  }
  int64_t first(int64_t step) const { return step * step_columns<BITS>() >> log2_size; }
};

// The entries of a step's lanes, the first of its groups being at p.
MB_INLINE vf load_groups(const float* p, vi spread) {
#if defined(__AVX512F__)
  return permute(load(p), spread);
#else
  // At most four groups: across the halves of a vector, it would take four times as long.
  return (vf)_mm256_permutevar_ps(_mm256_broadcast_ps((const __m128*)p), (__m256i)spread);
#endif
}

// sum + 2^SHIFT times the products of all planes of weights, at most TOP, with a piece of a token.
template <int PLANES, int TOP, int SHIFT = 0>
MB_INLINE vi dot_planes(vi sum, const vi* w, const int8_t (*x)[kVector]) {
#if defined(__AVX512VNNI__)
  vi own = SHIFT ? vi{} : sum;
  for (int p = 0; p < PLANES; ++p) own = dot_bytes(own, w[p], load_raw<vi>(x[p]));
  return SHIFT ? vi(own << SHIFT) + sum : own;
#else
  const __m256i one = _mm256_set1_epi16(1 << SHIFT), two = _mm256_set1_epi16(2 << SHIFT);
  const auto products = [](vi u, const int8_t* s) {
    return _mm256_maddubs_epi16((__m256i)u, load_raw<__m256i>(s));
  };
  // Planes are added in 16 bits, if their products fit: two for each plane.
  if constexpr (2 * TOP * 128 > INT16_MAX) {
    // Not even two of 8-bit codes do: their lowest bits go alone, and all others as one less.
    sum += (vi)_mm256_madd_epi16(products(w[0] & 0x01010101, x[0]), one);
    return sum + (vi)_mm256_madd_epi16(products(w[0] >> 1 & 0x7f7f7f7f, x[0]), two);
  } else if constexpr (2 * PLANES * TOP * 128 > INT16_MAX) {
    for (int p = 0; p < PLANES; ++p) sum += (vi)_mm256_madd_epi16(products(w[p], x[p]), one);
    return sum;
  } else {
    __m256i pairs = _mm256_setzero_si256();
    for (int p = 0; p < PLANES; ++p) pairs = _mm256_add_epi16(pairs, products(w[p], x[p]));
    return sum + (vi)_mm256_madd_epi16(pairs, one);
  }
#endif
}

template <int PIECES, int PLANES, int TOP, class S>
MB_INLINE vf step_dot(const vi* w, const S& x, const vi* zero_point) {
  constexpr int second = PIECES > 1 ? 1 : 0, third = PIECES == 3 ? 1 : 0;
  vi start = load_raw<vi>(x.start[0]);
  if (zero_point) start *= *zero_point;
  if (PIECES == 1) return int_to_float(dot_planes<PLANES, TOP>(start, w, x.plane[0]));
  const vi high = dot_planes<PLANES, TOP, 8>(start, w, x.plane[0]);
  const vi sum = dot_planes<PLANES, TOP>(high, w, x.plane[second]);
  if (PIECES == 2) return int_to_float(sum);
  start = load_raw<vi>(x.start[third]);
  if (zero_point) start *= *zero_point;
  const vi low = dot_planes<PLANES, TOP>(start, w, x.plane[PIECES - 1]);
  return fma(int_to_float(sum), splat(256.0f), int_to_float(low));
}

// total += one step of R rows times M tokens. `group` is the number of the step's first group.
template <int ELEMENT, int PIECES, int M, int R, bool ZERO_POINTS, bool ONE_GROUP, class S>
MB_INLINE void add_step(const Rows& rows, int64_t group, vi spread, const S* const* x, int64_t step,
                        vf (*total)[R]) {
  constexpr int planes = 8 / step_bits<ELEMENT>(), top = largest_integer(ELEMENT);
  for (int r = 0; r < R; ++r) {
    const int64_t at = r * rows.group_stride + group;
    vi w[planes], zero_point = {};
    split_planes<ELEMENT>(in_register(load_raw<vi>(rows.codes + r * rows.code_stride)),
                          rows.upper + r * rows.upper_stride, w);
    const vf scale = ONE_GROUP ? splat(rows.scales[at]) : load_groups(rows.scales + at, spread);
    if (ZERO_POINTS) {
      const float* offsets = reinterpret_cast<const float*>(rows.offsets + at);
      zero_point = bit_cast<vi>(load_groups(offsets, spread));
    }
    for (int m = 0; m < M; ++m) {
      const S& s = x[m][step];
      const vf dot = step_dot<PIECES, planes, top>(w, s, ZERO_POINTS ? &zero_point : nullptr);
      total[m][r] = fma(dot, scale * load(s.scale), total[m][r]);
    }
  }
}

// R rows times M tokens, all of k. `sums` is [M][R]. Not inline: elements may share it.
template <int ELEMENT, int PIECES, int M, int R, bool ZERO_POINTS, bool ONE_GROUP>
static __attribute__((noinline)) void multiply_rows(const Work& work, Rows rows,
                                                    const Tail<R>& tail, float (*sums)[R]) {
  constexpr int bits = step_bits<ELEMENT>(), bytes = R * (kVector + upper_bytes<ELEMENT>());
  using S = Step<bits, PIECES>;
  const Groups<bits> groups(work.segment.weight.format.group_size);
  const int64_t whole = work.tokens.columns / S::kColumns;
  const S* x[M];
  for (int m = 0; m < M; ++m) {
    const int64_t token = min64(m, work.tokens.count - 1);
    x[m] = reinterpret_cast<const S*>(work.prepared + token * work.stride);
  }
  vf total[M][R] = {};
  const uint8_t* ahead = rows.codes + kAhead;
  for (int64_t step = 0; step < whole; ++step, rows = rows.template after<ELEMENT>(1)) {
    // The hardware follows one stream well, and not R that begin anew every few lines.
    for (int at = 0; at < bytes; at += 64) __builtin_prefetch(ahead + at, 0, 2);
    ahead += bytes;
    add_step<ELEMENT, PIECES, M, R, ZERO_POINTS, ONE_GROUP>(rows, groups.first(step), groups.spread,
                                                            x, step, total);
  }
  if (whole * S::kColumns < work.tokens.columns) {
    add_step<ELEMENT, PIECES, M, R, ZERO_POINTS, ONE_GROUP>(rows.at(tail), groups.first(whole),
                                                            groups.spread, x, whole, total);
  }
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < R; ++r) sums[m][r] = sum_lanes(total[m][r]);
  }
}

// sums += R rows times a token's further terms. Not inline: few tokens have any, and the loop
// above needs all registers.
template <int ELEMENT, int PIECES, int R, bool ZERO_POINTS>
static __attribute__((noinline)) void add_terms(const Work& work, const Rows& rows,
                                                const Tail<R>& tail, int64_t m, float* sums) {
  constexpr int bits = step_bits<ELEMENT>();
  const Groups<bits> groups(work.segment.weight.format.group_size);
  const Token<bits, PIECES> token(work.prepared + m * work.stride, work.tokens.columns);
  const auto* const terms = token.terms;
  vf total[1][R] = {};
  for (int32_t i = 0; i < *token.term_count; ++i) {
    const int64_t step = token.step_of[i];
    const bool whole = step < work.tokens.columns / step_columns<bits>();
    add_step<ELEMENT, PIECES, 1, R, ZERO_POINTS, false>(
        whole ? rows.template after<ELEMENT>(step) : rows.at(tail), groups.first(step),
        groups.spread, &terms, i, total);
  }
  for (int r = 0; r < R; ++r) sums[r] += sum_lanes(total[0][r]);
}

// What is left of a row beyond its whole steps.
template <int ELEMENT>
MB_INLINE void copy_tail(const PackedRow& row, int64_t columns, uint8_t* codes, uint8_t* upper) {
  constexpr int bits = step_bits<ELEMENT>(), rest = element_bits(ELEMENT) - bits;
  const int64_t whole = columns / step_columns<bits>(), left = columns % step_columns<bits>();
  if (left == 0) return;
  memcpy(codes, row.codes + whole * kVector, plane_bytes(left, bits));
  memcpy(upper, row.upper + whole * upper_bytes<ELEMENT>(), plane_bytes(left, rest));
}

// out += R rows from row n on, times the tokens.
template <int ELEMENT, int PIECES, int M, int R>
static void multiply_some(const Work& work, int64_t n, Sums out, char* scratch) {
  constexpr int bits = step_bits<ELEMENT>();
  constexpr int code = ELEMENT & ~0x40;  // scales of other kinds are floats by then
  // A variant of its own is compiled where it may occur and counts most.
  constexpr bool integers = has_float16_scales(ELEMENT), one_plane = bits == element_bits(ELEMENT);
  const SegmentWeight& segment = work.segment;
  const int64_t width = padded_groups(segment), columns = segment.weight.columns;
  const int64_t groups = segment.weight.groups, bytes = segment.weight.code_bytes;
  float* scales = reinterpret_cast<float*>(scratch);
  int32_t* offsets = reinterpret_cast<int32_t*>(scales + R * width);
  Tail<R> tail;
  prefetch_scales<R>(segment.weight, n);
  for (int r = 0; r < R; ++r) {
    const PackedRow row = segment.weight.row(n + r);
    decode_scales<ELEMENT>(row, groups, scales + r * width);
    if (row.zero_points) decode_offsets(row, groups, element_bits(ELEMENT), offsets + r * width);
    copy_tail<ELEMENT>(row, columns, tail.codes[r], tail.upper[r]);
  }
  const PackedRow first = segment.weight.row(n);
  const Rows rows = {first.codes, first.upper, bytes, bytes, scales, offsets, width};
  float sums[M][R];
  const bool one_group = segment.weight.format.group_size >= step_columns<bits>();
  if (integers && segment.weight.zero_points) {
    multiply_rows<code, PIECES, M, R, integers, false>(work, rows, tail, sums);
  } else if (integers && one_plane && one_group) {
    multiply_rows<code, PIECES, M, R, false, integers && one_plane>(work, rows, tail, sums);
  } else {
    multiply_rows<code, PIECES, M, R, false, false>(work, rows, tail, sums);
  }
  for (int m = 0; m < M && m < work.tokens.count; ++m) {
    const char* const x = work.prepared + m * work.stride;
    if (*Token<bits, PIECES>(x, columns).term_count != 0) {
      const auto add = segment.weight.zero_points ? add_terms<code, PIECES, R, integers>
                                                  : add_terms<code, PIECES, R, false>;
      add(work, rows, tail, m, sums[m]);
    }
    for (int r = 0; r < R; ++r) out.data[m * out.stride + r] += sums[m][r];
  }
}

template <int ELEMENT, int PIECES, int M, int R>
static void multiply_item(const Work& work, int64_t first_row, int64_t last_row, Sums sums,
                          char* scratch) {
  const int64_t width = padded_groups(work.segment);
  memset(scratch, 0, 2 * R * width * sizeof(float));  // beyond the last group of a row
  int64_t n = first_row;
  for (; n + R <= last_row; n += R)
    multiply_some<ELEMENT, PIECES, M, R>(work, n, {sums.data + n - first_row, sums.stride},
                                         scratch);
  for (; n < last_row; ++n)
    multiply_some<ELEMENT, PIECES, M, 1>(work, n, {sums.data + n - first_row, sums.stride},
                                         scratch);
}

template <int ELEMENT, int PIECES>
void multiply(const Work& work, int64_t first_row, int64_t last_row, Sums sums, char* scratch) {
  switch (work.tokens.count) {
    case 1:
      return multiply_item<ELEMENT, PIECES, 1, rows_of_one_token(element_bits(ELEMENT))>(
          work, first_row, last_row, sums, scratch);
    case 2:
      return multiply_item<ELEMENT, PIECES, 2, 2>(work, first_row, last_row, sums, scratch);
    default:
      return multiply_item<ELEMENT, PIECES, 4, 2>(work, first_row, last_row, sums, scratch);
  }
}

int64_t scratch_bytes(const SegmentWeight& segment, const Tokens&) {
  return 2 * kMaxRows * padded_groups(segment) * int64_t(sizeof(float));
}

template <int ELEMENT, int KIND>
constexpr Path kPath = {
    token_bytes<step_bits<ELEMENT>(), pieces_of(Integers(KIND))>,
    prepare<step_bits<ELEMENT>(), pieces_of(Integers(KIND)), KIND>,
    scratch_bytes,
    dot_item_rows,
    multiply<ELEMENT, pieces_of(Integers(KIND))>,
};

template <int ELEMENT>
const Path* path_of(Integers kind) {
  switch (kind) {
    case kE2M1Codes:
      return &kPath<ELEMENT, kE2M1Codes>;
    case kMXInt8Codes:
      return &kPath<ELEMENT, kMXInt8Codes>;
    case kInt8Values:
      return &kPath<ELEMENT, kInt8Values>;
    case kInt16Values:
      return &kPath<ELEMENT, kInt16Values>;
    default:
      return &kPath<ELEMENT, kInt24Values>;
  }
}

}  // namespace

const Path* integer_dot_path(const SegmentWeight& segment, const Tokens& tokens,
                             bool int8_activations) {
  if (!has_integer_activations(segment)) return nullptr;
  const Integers kind = integers_for(segment, tokens.dtype, int8_activations);
  const Path* path = nullptr;
  with_element(segment.element(), [&](auto tag) {
    constexpr int element = decltype(tag)::value;
    if constexpr (kLanes == 8 && element_bits(element) == 8) {
      // Their products overflow the 16-bit sums of AVX2 and take twice as many instructions. Only
      // activations that are bytes by their format go this way; all others keep the float path.
      if constexpr (has_integer_codes(element))
        path = kind == kMXInt8Codes ? &kPath<element, kMXInt8Codes> : nullptr;
    } else if constexpr (has_integer_codes(element)) {
      path = path_of<element>(kind);
    }
  });
  return path;
}

#endif

}  // namespace MB_ISA
}  // namespace mixbits
