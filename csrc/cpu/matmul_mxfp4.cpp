// packed_matmul of MXFP4 weights with MXFP4 activations, in exact integers (AVX-512 VNNI).
//
// Twice an e2m1 value is an integer of magnitude at most 12, so the products inside a 32-block
// are integers, vpdpbusd adds four of them to an int32 lane without rounding, and only the sum
// meets the scales. One run of 128 columns is one load of 64 packed bytes:
//
//   bytes      b0     b1     ...  b63            byte j holds columns 2j (low) and 2j + 1 (high)
//   lane l     bytes 4l .. 4l+3, both nibbles    so lanes 4b .. 4b+3 are 32-block b of the run
//
// vpdpbusd takes one unsigned operand: weights are looked up as 2w + 12, and the sum begins with
// -12 times the sum of the activations that meet them. Activations are prepared once per call in
// the order in which the lanes need them, so the weight stays as it is stored.
#ifdef __AVX512VNNI__
#include <omp.h>

#include "group.h"
#include "kernels.h"
#include "ops.h"

namespace mixbits {
namespace MB_ISA {

namespace {

constexpr int kTileM = 8;
constexpr int kTileN = 2;
constexpr int kPanelRows = 32;  // rows that stay in L2 while all tokens pass
constexpr int kRunBlocks = kRun / 32;

// One token's share of a run.
struct TokenRun {
  int8_t low[64];     // twice the values of the even columns
  int8_t high[64];    // and of the odd ones
  int32_t start[16];  // -12 * (the sum of a lane's eight values)
  float scale[16];    // of the lane's block, over 4 for the two doublings; 0 beyond the last block
};
static_assert(sizeof(TokenRun) == 256, "four cache lines");

// Tokens are a cache line more than their runs apart, lest they share cache sets.
int64_t token_stride(int64_t columns) {
  return group_count(columns, kRun) * int64_t(sizeof(TokenRun)) + 64;
}

// Whether the values of a block with this scale are finite in the dtype of x, and in float32 with
// room to spare. Where not, x must be rounded to its dtype, which the float32 code does. At the
// lower end nothing is lost: below the dtype's smallest number, x is on the grid already.
bool is_exact(int byte, int dtype) { return byte <= (dtype == kFloat16 ? 127 + 13 : 250); }

MB_INLINE __m512i look_up(__m512i indices, __m128i table) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), indices);
}

bool prepare_run(const float* x, int blocks, const Format format, int dtype, TokenRun* out) {
  alignas(64) uint8_t codes[kRun] = {};
  memset(out->scale, 0, sizeof(out->scale));
  bool exact = true;
  for (int b = 0; b < blocks; ++b) {
    const int byte = encode_group<kE2M1>(x + 32 * b, codes + 32 * b, 32, format).scale;
    exact = exact && is_exact(byte, dtype);
    for (int i = 0; i < 4; ++i) out->scale[4 * b + i] = 0.25f * e8m0_to_float(byte);
  }
  const __m512i first = _mm512_load_si512(codes), second = _mm512_load_si512(codes + 64);
  const __m512i byte_mask = _mm512_set1_epi16(0xff);
  const auto narrow = [](__m512i a, __m512i b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(a)),
                              _mm512_cvtepi16_epi8(b), 1);
  };
  const __m128i doubled = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  const __m512i low = look_up(
      narrow(_mm512_and_si512(first, byte_mask), _mm512_and_si512(second, byte_mask)), doubled);
  const __m512i high =
      look_up(narrow(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8)), doubled);
  const __m512i twelve = _mm512_set1_epi8(12);
  __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), twelve, low);
  sum = _mm512_dpbusd_epi32(sum, twelve, high);
  store_raw(out->low, low);
  store_raw(out->high, high);
  store_raw(out->start, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
  return exact;
}

bool prepare_token(const MatmulArgs& a, int64_t m, TokenRun* out) {
  const int size = dtype_bytes(a.dtype);
  const char* in = static_cast<const char*>(a.x) + m * a.columns * size;
  const Format format = decode_format(a.activation);
  bool exact = true;
  for (int64_t first = 0; first < a.columns; first += kRun, ++out) {
    const int count = int(min64(a.columns - first, kRun));
    alignas(64) float x[kRun];
    if (count < kRun) memset(x, 0, sizeof(x));
    load_row(in + first * size, count, a.dtype, x);
    exact &= prepare_run(x, int(group_count(count, 32)), format, a.dtype, out);
  }
  return exact;
}

// A row's scales as floats, zeros up to whole runs.
void decode_scales(const uint8_t* bytes, int64_t count, float* out) {
  for (int64_t i = 0; i < round_up(count, kRunBlocks); i += kLanes) {
    const __mmask16 valid =
        count - i >= kLanes ? 0xffff : __mmask16((1u << (count - i > 0 ? count - i : 0)) - 1);
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(valid, bytes + i));
    // Bytes 0 and 255 are 2^-127 and NaN; both need this bit.
    const __m512i next =
        _mm512_and_si512(_mm512_add_epi32(byte, _mm512_set1_epi32(1)), _mm512_set1_epi32(0xff));
    const __mmask16 special = _mm512_cmplt_epi32_mask(next, _mm512_set1_epi32(2));
    const __m512i bits = _mm512_slli_epi32(byte, 23);
    const __m512i all = _mm512_mask_or_epi32(bits, special, bits, _mm512_set1_epi32(0x00400000));
    _mm512_storeu_ps(out + i, _mm512_castsi512_ps(_mm512_maskz_mov_epi32(valid, all)));
  }
}

struct Rows {
  const uint8_t* codes[kTileN];
  const float* scales[kTileN];
};

// M tokens times kTileN rows, all of k.
template <int M>
void multiply_tile(const Rows& rows, const TokenRun* tokens, int64_t stride, int64_t columns,
                   vf (*sums)[kTileN]) {
  const __m128i table = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  __m512 total[M][kTileN];
  for (int m = 0; m < M; ++m) {
    for (int j = 0; j < kTileN; ++j) total[m][j] = _mm512_setzero_ps();
  }
  for (int64_t first = 0, run = 0; first < columns; first += kRun, ++run) {
    const int64_t left = (columns - first + 1) / 2;
    const __mmask64 valid = left >= 64 ? ~0ull : (1ull << left) - 1;
    __m512i low[kTileN], high[kTileN];
    __m512 scale[kTileN];
    for (int j = 0; j < kTileN; ++j) {
      const __m512i bytes = _mm512_maskz_loadu_epi8(valid, rows.codes[j] + run * 64);
      low[j] = look_up(_mm512_and_si512(bytes, nibble), table);
      high[j] = look_up(_mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble), table);
      scale[j] = _mm512_permutexvar_ps(
          spread, _mm512_castps128_ps512(_mm_loadu_ps(rows.scales[j] + run * kRunBlocks)));
    }
    for (int m = 0; m < M; ++m) {
      const TokenRun* t =
          reinterpret_cast<const TokenRun*>(reinterpret_cast<const char*>(tokens) + m * stride) +
          run;
      for (int j = 0; j < kTileN; ++j) {
        __m512i dot =
            _mm512_dpbusd_epi32(_mm512_load_si512(t->start), low[j], _mm512_load_si512(t->low));
        dot = _mm512_dpbusd_epi32(dot, high[j], _mm512_load_si512(t->high));
        const __m512 factor = _mm512_mul_ps(scale[j], _mm512_load_ps(t->scale));
        total[m][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factor, total[m][j]);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int j = 0; j < kTileN; ++j) sums[m][j] = (vf)total[m][j];
  }
}

void multiply_tokens(int count, const Rows& rows, const TokenRun* tokens, int64_t stride,
                     int64_t columns, vf (*sums)[kTileN]) {
  switch (count) {
    case 1:
      return multiply_tile<1>(rows, tokens, stride, columns, sums);
    case 2:
      return multiply_tile<2>(rows, tokens, stride, columns, sums);
    case 3:
      return multiply_tile<3>(rows, tokens, stride, columns, sums);
    case 4:
      return multiply_tile<4>(rows, tokens, stride, columns, sums);
    case 5:
      return multiply_tile<5>(rows, tokens, stride, columns, sums);
    case 6:
      return multiply_tile<6>(rows, tokens, stride, columns, sums);
    case 7:
      return multiply_tile<7>(rows, tokens, stride, columns, sums);
    default:
      return multiply_tile<8>(rows, tokens, stride, columns, sums);
  }
}

// All tokens times the rows [first, last), at most kPanelRows. `scales` is [kPanelRows, width].
void multiply_panel(const MatmulArgs& a, const PackedWeight& weight, const TokenRun* tokens,
                    int64_t stride, int64_t first, int64_t last, float* scales, int64_t width) {
  for (int64_t n = first; n < last; ++n) {
    decode_scales(weight.row(n).scales, group_count(a.columns, 32), scales + (n - first) * width);
  }
  for (int64_t m = 0; m < a.tokens; m += kTileM) {
    const int count = int(min64(a.tokens - m, kTileM));
    const TokenRun* tile =
        reinterpret_cast<const TokenRun*>(reinterpret_cast<const char*>(tokens) + m * stride);
    for (int64_t n = first; n < last; n += kTileN) {
      Rows rows;
      for (int j = 0; j < kTileN; ++j) {
        const int64_t row = min64(n + j, last - 1);  // the last row twice, rather than none
        rows.codes[j] = weight.row(row).codes;
        rows.scales[j] = scales + (row - first) * width;
      }
      vf sums[kTileM][kTileN];
      multiply_tokens(count, rows, tile, stride, a.columns, sums);
      for (int i = 0; i < count; ++i) {
        for (int j = 0; j < kTileN && n + j < last; ++j) {
          store_element(a.out, a.dtype, (m + i) * a.rows + n + j, sum_lanes(sums[i][j]));
        }
      }
    }
  }
}

}  // namespace

bool mxfp4_matmul(const MatmulArgs& a, bool serial, bool* done) {
  const int64_t stride = token_stride(a.columns);
  const int64_t width = round_up(group_count(a.columns, 32), kLanes);
  Scratch scratch(a.tokens * stride);
  Scratch scales(omp_get_max_threads() * kPanelRows * width * sizeof(float));
  if (!scratch.data || !scales.data) return false;
  bool exact = true;
#pragma omp parallel for schedule(static) reduction(&& : exact) if (!serial && a.tokens > 4)
  for (int64_t m = 0; m < a.tokens; ++m) {
    TokenRun* token = reinterpret_cast<TokenRun*>(scratch.bytes() + m * stride);
    exact = prepare_token(a, m, token) && exact;
  }
  *done = exact;
  if (!exact) return true;
  const PackedWeight weight = {a.codes, a.scales, a.zero_points, a.columns,
                               decode_format(a.format)};
  const TokenRun* tokens = static_cast<const TokenRun*>(scratch.data);
#pragma omp parallel for schedule(dynamic) if (!serial)
  for (int64_t first = 0; first < a.rows; first += kPanelRows) {
    multiply_panel(a, weight, tokens, stride, first, min64(first + kPanelRows, a.rows),
                   scales.floats() + omp_get_thread_num() * kPanelRows * width, width);
  }
  return true;
}

}  // namespace MB_ISA
}  // namespace mixbits
#endif
