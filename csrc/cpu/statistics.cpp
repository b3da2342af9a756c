// Sensitivity statistics: how far several formats move a weight, weighed per element.
//
//   fisher     out[f, slab] = sum  row_weight[n] column_weight[k] (W - Q_f(W))[n, k]^2
//   gradient   out[f, slab] = sum  |gradient[n, k] (W - Q_f(W))[n, k]|
//
// W is read once for all formats: a tile of kTileRows rows x 128 columns is visited row by row,
// and each run is quantized to every format while it is in L1.
//
//            128 columns
//          +------------+----   one tile: one item of work, one partial sum per format and slab
//   64 rows|            |
//          +------------+----
//
// Partial sums are doubles over fixed tiles and are added in the order of rows afterwards, so the
// result does not depend on the number of threads.
#include <omp.h>

#include "group.h"
#include "kernels.h"
#include "ops.h"

namespace mixbits {
namespace MB_ISA {

constexpr int kTileRows = 64;
constexpr int kSlab = 32;
constexpr int kRunSlabs = kRun / kSlab;

// sums[0..columns) += row_weight * (x - q)^2, or |g * (x - q)|.
MB_INLINE void add_errors(const float* x, const float* q, const float* g, double row_weight,
                          int columns, double* sums) {
  for (int k = 0; k < columns; k += kLanes) {
    const vf error = load(x + k) - load(q + k);
    for (int half = 0; half < 2; ++half) {
      double* at = sums + k + half * (kLanes / 2);
      const vd e = widen_to_double(error, half);
      vd term;
      if (g) {
        term = widen_to_double(load(g + k), half) * e;
        term = term < 0 ? -term : term;
      } else {
        term = (e * e) * row_weight;
      }
      store_raw(at, load_raw<vd>(at) + term);
    }
  }
}

// One tile; `sums` is [formats, kRun], `partial` [formats, kRunSlabs].
static void tile_statistics(const StatisticsArgs& a, int64_t first_row, int64_t first, double* sums,
                            double* partial) {
  const int count = int(min64(a.columns - first, kRun)), size = dtype_bytes(a.dtype);
  const int gradient_size = dtype_bytes(a.gradient_dtype);
  const int64_t last_row = min64(first_row + kTileRows, a.rows);
  alignas(64) float x[kRun] = {}, q[kRun], g[kRun] = {};
  memset(sums, 0, sizeof(double) * a.format_count * kRun);
  for (int64_t n = first_row; n < last_row; ++n) {
    const int64_t at = n * a.columns + first;
    load_row(static_cast<const char*>(a.weight) + at * size, count, a.dtype, x);
    if (a.gradient) {
      const char* row = static_cast<const char*>(a.gradient) + at * gradient_size;
      load_row(row, count, a.gradient_dtype, g);
    }
    for (int f = 0; f < a.format_count; ++f) {
      const Format format = decode_format(a.formats[f]);
      fake_run(x, q, int(round_up(count, format.group_size)), format);
      add_errors(x, q, a.gradient ? g : nullptr, a.row_weight ? a.row_weight[n] : 0.0,
                 int(round_up(count, kLanes)), sums + f * kRun);
    }
  }
  for (int f = 0; f < a.format_count; ++f) {
    for (int s = 0; s < kRunSlabs; ++s) {
      double total = 0;
      for (int k = s * kSlab; k < (s + 1) * kSlab && k < count; ++k) {
        const double weight = a.column_weight ? a.column_weight[first + k] : 1.0;
        total += weight * sums[f * kRun + k];
      }
      partial[f * kRunSlabs + s] = total;
    }
  }
}

bool statistics(const StatisticsArgs& a) {
  const int64_t runs = group_count(a.columns, kRun), blocks = group_count(a.rows, kTileRows);
  const int64_t slabs = group_count(a.columns, kSlab), per_tile = a.format_count * kRunSlabs;
  Scratch partial(blocks * runs * per_tile * sizeof(double));
  Scratch sums(omp_get_max_threads() * a.format_count * kRun * sizeof(double));
  if (!partial.data || !sums.data) return false;
  double* partials = partial.doubles();
#pragma omp parallel for schedule(dynamic) if (blocks * runs > 1)
  for (int64_t tile = 0; tile < blocks * runs; ++tile) {
    double* own = sums.doubles() + int64_t(omp_get_thread_num()) * a.format_count * kRun;
    tile_statistics(a, tile / runs * kTileRows, tile % runs * kRun, own,
                    partials + tile * per_tile);
  }
  for (int f = 0; f < a.format_count; ++f) {
    for (int64_t slab = 0; slab < slabs; ++slab) {
      double total = 0;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t tile = block * runs + slab / kRunSlabs;
        total += partials[tile * per_tile + f * kRunSlabs + slab % kRunSlabs];
      }
      a.out[f * slabs + slab] = total;
    }
  }
  return true;
}

}  // namespace MB_ISA
}  // namespace mixbits
