// The bf16 dot path of packed_matmul: few tokens, e4m3 or e5m2 weights, tokens in bfloat16.
//
// A step is 64 codes of a row, two blocks of 32. Their high and low bytes are interleaved within
// 128-bit lanes, so the two vectors of 32 weights have the columns
//
//   even    0-7   16-23  32-39  48-55        chunks of 8 columns: 0, 2, 4, 6
//   odd     8-15  24-31  40-47  56-63                             1, 3, 5, 7
//
// in which order the tokens are prepared. Floats 0-7 of both products are block 0's, 8-15 block
// 1's, and meet their scale there.
#include "bfloat16.h"

namespace mixbits {
namespace MB_ISA {

#if !defined(MB_BFLOAT16)

const Path* bfloat16_dot_path(const SegmentWeight&, const Tokens&) { return nullptr; }

#else

namespace {

constexpr int kStep = 64;

int64_t token_bytes(const SegmentWeight&, int64_t columns) { return round_up(columns, kStep) * 2; }

bool prepare(const SegmentWeight& segment, const Tokens& tokens, int64_t m, float* floats,
             char* out) {
  float_token(segment, tokens, m, floats);
  const int64_t padded = round_up(tokens.columns, kStep);
  uint16_t* values = reinterpret_cast<uint16_t*>(out);
  if (!narrow_to_bfloat16(floats, padded, values)) return false;
  for (int64_t k = 0; k < padded; k += kStep) {
    const __m512i first = _mm512_loadu_si512(values + k),
                  second = _mm512_loadu_si512(values + k + 32);
    const __m512i even = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13);
    const __m512i odd = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
    _mm512_storeu_si512(values + k, _mm512_permutex2var_epi64(first, even, second));
    _mm512_storeu_si512(values + k + 32, _mm512_permutex2var_epi64(first, odd, second));
  }
  return true;
}

// total += one step of R rows times M tokens; row r's codes are at codes + r * code_stride.
template <int M, int R>
MB_INLINE void add_step(const uint8_t* codes, int64_t code_stride, const float* scales,
                        int64_t group_stride, const ByteTables& tables, const uint16_t* const* x,
                        int64_t step, __m512 (*total)[R]) {
  const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  for (int r = 0; r < R; ++r) {
    const __m512i bytes = (__m512i)in_register(load_raw<vi>(codes + r * code_stride));
    __m512i high, low;
    look_up_bytes(tables, bytes, &high, &low);
    const __m512i even = _mm512_unpacklo_epi8(low, high), odd = _mm512_unpackhi_epi8(low, high);
    const __m512 scale =
        _mm512_permutexvar_ps(spread, (__m512)load(scales + r * group_stride + step * 2));
    for (int m = 0; m < M; ++m) {
      const uint16_t* values = x[m] + step * kStep;
      __m512 dot = dot_bfloat16(_mm512_setzero_ps(), even, _mm512_loadu_si512(values));
      dot = dot_bfloat16(dot, odd, _mm512_loadu_si512(values + 32));
      total[m][r] = _mm512_fmadd_ps(dot, scale, total[m][r]);
    }
  }
}

// out += R rows from row n on, times the tokens.
template <int ELEMENT, int M, int R>
void multiply_some(const Work& work, const ByteTables& tables, int64_t n, Sums out, float* scales) {
  const SegmentWeight& segment = work.segment;
  const int64_t columns = segment.weight.columns, width = padded_groups(segment);
  const int64_t whole = columns / kStep;
  alignas(64) uint8_t tail[R][kStep] = {};
  prefetch_scales<R>(segment.weight, n);
  for (int r = 0; r < R; ++r) {
    const PackedRow row = segment.weight.row(n + r);
    decode_scales<ELEMENT>(row, segment.weight.groups, scales + r * width);
    if (whole * kStep < columns)
      memcpy(tail[r], row.codes + whole * kStep, columns - whole * kStep);
  }
  const uint16_t* x[M];
  for (int m = 0; m < M; ++m) {
    const int64_t token = min64(m, work.tokens.count - 1);
    x[m] = reinterpret_cast<const uint16_t*>(work.prepared + token * work.stride);
  }
  __m512 total[M][R] = {};
  const uint8_t* codes = segment.weight.row(n).codes;
  const uint8_t* ahead = codes + kAhead;
  for (int64_t step = 0; step < whole; ++step, codes += kStep, ahead += R * kStep) {
    for (int r = 0; r < R; ++r) __builtin_prefetch(ahead + r * kStep, 0, 2);
    add_step<M, R>(codes, columns, scales, width, tables, x, step, total);
  }
  if (whole * kStep < columns)
    add_step<M, R>(tail[0], kStep, scales, width, tables, x, whole, total);
  for (int m = 0; m < M && m < work.tokens.count; ++m) {
    for (int r = 0; r < R; ++r) out.data[m * out.stride + r] += sum_lanes((vf)total[m][r]);
  }
}

template <int ELEMENT, int M, int R>
void multiply_item(const Work& work, int64_t first_row, int64_t last_row, Sums sums,
                   char* scratch) {
  static const ByteTables tables = byte_tables<ELEMENT>();
  float* scales = reinterpret_cast<float*>(scratch);
  memset(scales, 0, R * padded_groups(work.segment) * sizeof(float));
  int64_t n = first_row;
  for (; n + R <= last_row; n += R)
    multiply_some<ELEMENT, M, R>(work, tables, n, {sums.data + n - first_row, sums.stride}, scales);
  for (; n < last_row; ++n)
    multiply_some<ELEMENT, M, 1>(work, tables, n, {sums.data + n - first_row, sums.stride}, scales);
}

template <int ELEMENT>
void multiply(const Work& work, int64_t first_row, int64_t last_row, Sums sums, char* scratch) {
  switch (work.tokens.count) {
    case 1:
      return multiply_item<ELEMENT, 1, rows_of_one_token(8)>(work, first_row, last_row, sums,
                                                             scratch);
    case 2:
      return multiply_item<ELEMENT, 2, 2>(work, first_row, last_row, sums, scratch);
    default:
      return multiply_item<ELEMENT, 4, 2>(work, first_row, last_row, sums, scratch);
  }
}

int64_t scratch_bytes(const SegmentWeight& segment, const Tokens&) {
  return kMaxRows * padded_groups(segment) * int64_t(sizeof(float));
}

template <int ELEMENT>
constexpr Path kPath = {token_bytes, prepare, scratch_bytes, dot_item_rows, multiply<ELEMENT>};

}  // namespace

const Path* bfloat16_dot_path(const SegmentWeight& segment, const Tokens& tokens) {
  if (!has_bfloat16_activations(segment, tokens.dtype)) return nullptr;
  if (segment.element() == kE4M3) return &kPath<kE4M3>;
  if (segment.element() == kE5M2) return &kPath<kE5M2>;
  return nullptr;
}

#endif

}  // namespace MB_ISA
}  // namespace mixbits
