// square_sums: what the squares of a column add up to, and those of its rounding errors in several
// formats: the second moments that sensitivity needs (mixbits/measuring/sensitivity.py).
//
// A thread takes whole columns, so that every sum goes through the rows in their order: the result
// is the same for any number of threads. It takes as many as its sums stay in L1 for.
#include <omp.h>

#include "cpu/codes/span.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"

namespace mixbits {
namespace MB_ISA {

constexpr int64_t kMostColumns = 1024;

template <int DTYPE>
MB_INLINE vf widened(const char* p) {
  if constexpr (DTYPE == kFloat32) {
    return load_raw<vf>(p);
  } else {
    return to_float(load_raw<vh>(p), DTYPE);
  }
}

// Up to kLanes - 1 columns too many become zeros.
template <int DTYPE>
MB_INLINE void widen(const char* x, int64_t count, float* out) {
  constexpr int size = dtype_bytes(DTYPE);
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) store_raw(out + k, widened<DTYPE>(x + k * size));
  if (k == count) return;
  alignas(64) char rest[kLanes * size] = {};
  memcpy(rest, x + k * size, (count - k) * size);
  store_raw(out + k, widened<DTYPE>(rest));
}

// Squares are rounded to float, their sums are not.
MB_INLINE void add_squares(const float* __restrict x, int64_t count, double* __restrict sums) {
  for (int64_t k = 0; k < count; ++k) sums[k] += x[k] * x[k];
}

MB_INLINE void add_errors(const float* __restrict x, const float* __restrict rounded, int64_t count,
                          double* __restrict sums) {
  for (int64_t k = 0; k < count; ++k) {
    const float error = x[k] - rounded[k];
    sums[k] += error * error;
  }
}

// `spans` is [formats, rows], or null where no format needs any.
template <int DTYPE>
static void sum_columns(const SquareSumsArgs& a, const float* spans, int64_t first, int64_t count) {
  constexpr int size = dtype_bytes(DTYPE);
  alignas(64) float wide[kMostColumns] = {}, rounded[kMostColumns];
  const int padded = int(round_up(count, kRun));
  double* sums = a.out + first;
  for (int f = 0; f <= a.format_count; ++f) {
    memset(sums + f * a.columns, 0, count * sizeof(double));
  }
  const char* x = static_cast<const char*>(a.x) + first * size;
  for (int64_t row = 0; row < a.rows; ++row, x += a.columns * size) {
    widen<DTYPE>(x, count, wide);
    add_squares(wide, count, sums);
    for (int f = 0; f < a.format_count; ++f) {
      const float span = spans ? spans[f * a.rows + row] : 0;
      fake_run(wide, rounded, padded, decode_format(a.formats[f]), span);
      add_errors(wide, rounded, count, sums + (1 + f) * a.columns);
    }
  }
}

bool square_sums(const SquareSumsArgs& a) {
  const bool serial = a.rows * group_count(a.columns, kRun) <= kSerialRuns;
  const int64_t threads = serial ? 1 : omp_get_max_threads();
  const int64_t shares = threads * group_count(a.columns, threads * kMostColumns);
  const int64_t share = round_up(group_count(a.columns, shares), kRun);
  const int64_t items = group_count(a.columns, share);
  const bool spanned = need_spans(a.formats, a.format_count);
  const Scratch memory(spanned ? a.format_count * a.rows * sizeof(float) : 0);
  if (!memory.data) return false;
  const float* const spans = spanned ? memory.floats() : nullptr;
  if (spanned)
    find_spans(a.x, a.rows, a.columns, a.dtype, a.formats, a.format_count, memory.floats());
#pragma omp parallel for schedule(static) if (!serial)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t first = item * share, count = min64(a.columns - first, share);
    with_dtype(a.dtype,
               [&](auto tag) { sum_columns<decltype(tag)::value>(a, spans, first, count); });
  }
  return true;
}

}  // namespace MB_ISA
}  // namespace mixbits
