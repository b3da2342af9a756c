// The plain path: one token, and a weight that was left alone, [N, K] of the token's dtype.
#include "matmul.h"

namespace mixbits {
namespace MB_ISA {

namespace {

constexpr int kRows = 4;     // side by side, so that one addition need not wait for the last
constexpr int kStreams = 2;  // partial sums of a row

int64_t token_bytes(const SegmentWeight&, int64_t columns) {
  return round_up(columns, kLanes) * int64_t(sizeof(float));
}

bool prepare(const SegmentWeight&, const Tokens& tokens, int64_t m, float*, char* out) {
  tokens.load(m, reinterpret_cast<float*>(out));
  return true;
}

template <int DTYPE>
MB_INLINE vf load_elements(const char* p) {
  return DTYPE == kFloat32 ? load_raw<vf>(p) : to_float(load_raw<vh>(p), DTYPE);
}

// R rows from `row` on, which are `bytes` apart.
template <int DTYPE, int R>
void dot_rows(const char* row, int64_t bytes, const float* x, int64_t columns, float* sums) {
  constexpr int size = dtype_bytes(DTYPE);
  vf total[R][kStreams] = {};
  int64_t k = 0;
  for (; k + kStreams * kLanes <= columns; k += kStreams * kLanes) {
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(row + r * bytes + k * size + 1024, 0, 2);
      for (int s = 0; s < kStreams; ++s) {
        const int64_t at = k + s * kLanes;
        total[r][s] =
            fma(load_elements<DTYPE>(row + r * bytes + at * size), load(x + at), total[r][s]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    alignas(64) float rest[kStreams * kLanes];
    memset(rest, 0, sizeof(rest));
    load_row_as<DTYPE>(row + r * bytes + k * size, columns - k, rest);
    vf sum = total[r][0] + total[r][1];
    for (int64_t i = 0; k + i < columns; i += kLanes)
      sum = fma(load(rest + i), load(x + k + i), sum);
    sums[r] = sum_lanes(sum);
  }
}

template <int DTYPE>
void multiply_as(const Work& work, int64_t first_row, int64_t last_row, float* out) {
  const int64_t columns = work.tokens.columns, bytes = columns * dtype_bytes(DTYPE);
  const float* x = reinterpret_cast<const float*>(work.prepared);
  const char* weight = reinterpret_cast<const char*>(work.segment.weight.codes);
  for (int64_t n = first_row; n < last_row;) {
    float sums[kRows];
    const bool several = n + kRows <= last_row;
    if (several) {
      dot_rows<DTYPE, kRows>(weight + n * bytes, bytes, x, columns, sums);
    } else {
      dot_rows<DTYPE, 1>(weight + n * bytes, bytes, x, columns, sums);
    }
    for (int r = 0; r < (several ? kRows : 1); ++r) out[n++ - first_row] += sums[r];
  }
}

void multiply(const Work& work, int64_t first_row, int64_t last_row, Sums sums, char*) {
  with_dtype(work.tokens.dtype, [&](auto tag) {
    multiply_as<decltype(tag)::value>(work, first_row, last_row, sums.data);
  });
}

int64_t no_scratch(const SegmentWeight&, const Tokens&) { return 0; }

int64_t item_rows(const SegmentWeight&, const Tokens& tokens) {
  return item_rows_of(tokens.columns * dtype_bytes(tokens.dtype));
}

constexpr Path kPlain = {token_bytes, prepare, no_scratch, item_rows, multiply};

}  // namespace

const Path* plain_path() { return &kPlain; }

}  // namespace MB_ISA
}  // namespace mixbits
