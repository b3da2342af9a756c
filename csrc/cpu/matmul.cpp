// packed_matmul: out[m, n] = sum over k of x[m, k] * W[n, k], W packed.
//
// x becomes float32 once per call, in rows padded with zeros to whole runs. W is never decoded as
// a whole:
//
//   few tokens    each thread decodes a row of W in registers and multiplies it there
//   many tokens   each thread decodes a panel of rows to float32, of about the size of its L2, and
//                 multiplies all of x with it, kTileM x kTileN outputs at a time in registers
//
// Vector lanes run along k in both, so packed rows are read as they are stored, and a sum has
// kLanes partial sums that are added at the end. The order of additions does not depend on the
// number of threads. MXFP4 times MXFP4 has a file of its own, with integer dot products.
#include <omp.h>

#include "group.h"
#include "kernels.h"
#include "ops.h"

namespace mixbits {
namespace MB_ISA {

// As many accumulators as there are registers, less those for operands.
constexpr int kTileM = 6;
constexpr int kTileN = kLanes == 16 ? 4 : 2;
constexpr int kFewTokens = 4;
constexpr int64_t kPanelBytes = 512 * 1024;
constexpr int64_t kSerialProducts = 32 * 1024;

// x as float32 [tokens, stride]. The stride is a cache line more than whole runs: rows that are a
// power of two apart would share the few ways of one cache set.
struct Activations {
  const float* data;
  int64_t stride;
};

static int64_t padded_stride(int64_t columns) { return round_up(columns, kRun) + 16; }

// One token to float32; fake-quantized, and rounded to its own dtype, where a format asks for it.
static void convert_token(const MatmulArgs& a, int64_t m, float* out) {
  const int size = dtype_bytes(a.dtype);
  const char* in = static_cast<const char*>(a.x) + m * a.columns * size;
  const Format format = decode_format(a.activation);
  for (int64_t first = 0; first < a.columns; first += kRun) {
    const int count = int(min64(a.columns - first, kRun));
    if (count < kRun) memset(out + first, 0, kRun * sizeof(float));
    load_row(in + first * size, count, a.dtype, out + first);
    if (!a.activation) continue;
    alignas(64) float q[kRun];
    alignas(64) char rounded[kRun * sizeof(float)];
    fake_run(out + first, q, int(round_up(count, format.group_size)), format);
    store_row(q, count, a.dtype, rounded);
    load_row(rounded, count, a.dtype, out + first);
  }
}

// --- few tokens -----------------------------------------------------------------------------

template <int ELEMENT, int M>
static void dot_row(const MatmulArgs& a, const PackedRow& row, int group_size, const Activations x,
                    int64_t n) {
  constexpr int bits = element_bits(ELEMENT);
  // Two sums per token, so that one addition need not wait for the last.
  vf sums[M][2] = {};
  int64_t g = 0;
  for (int64_t first = 0; first < a.columns; first += kRun) {
    const int count = int(min64(a.columns - first, kRun));
    RunBytes bytes;
    run_bytes<bits>(row, first, count, &bytes);
    for (int k = 0; k < count; k += group_size, ++g) {
      const GroupValue group = group_value<ELEMENT>(row, g);
      for (int i = k; i < k + group_size; i += 2 * kLanes) {
        for (int half = 0; half < 2; ++half) {
          const int at = i + half * kLanes;
          const vi codes = unpack<bits>(bytes.data + at * bits / 8);
          const vf w = decode<ELEMENT>(codes, group.offset) * group.scale;
          for (int m = 0; m < M; ++m) {
            sums[m][half] = fma(w, load(x.data + m * x.stride + first + at), sums[m][half]);
          }
        }
      }
    }
  }
  for (int m = 0; m < M; ++m)
    store_element(a.out, a.dtype, m * a.rows + n, sum_lanes(sums[m][0] + sums[m][1]));
}

template <int ELEMENT>
static void dot_rows(const MatmulArgs& a, const PackedWeight& weight, const Activations x,
                     bool serial) {
  const int group_size = weight.format.group_size;
#pragma omp parallel for schedule(static) if (!serial)
  for (int64_t n = 0; n < a.rows; ++n) {
    const PackedRow row = weight.row(n);
    if (a.tokens == 1) dot_row<ELEMENT, 1>(a, row, group_size, x, n);
    if (a.tokens == 2) dot_row<ELEMENT, 2>(a, row, group_size, x, n);
    if (a.tokens == 3) dot_row<ELEMENT, 3>(a, row, group_size, x, n);
    if (a.tokens == 4) dot_row<ELEMENT, 4>(a, row, group_size, x, n);
  }
}

// --- many tokens ----------------------------------------------------------------------------

// M tokens times kTileN panel rows, all of k.
template <int M>
static void multiply_tile(const MatmulArgs& a, const float* x, const float* panel, int64_t stride,
                          int64_t m, int64_t n, int rows) {
  vf sums[M][kTileN] = {};
  for (int64_t k = 0; k < a.columns; k += kLanes) {
    vf w[kTileN];
    for (int j = 0; j < kTileN; ++j) w[j] = load(panel + j * stride + k);
    for (int i = 0; i < M; ++i) {
      const vf v = load(x + i * stride + k);
      for (int j = 0; j < kTileN; ++j) sums[i][j] = fma(v, w[j], sums[i][j]);
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < rows; ++j)
      store_element(a.out, a.dtype, (m + i) * a.rows + n + j, sum_lanes(sums[i][j]));
  }
}

static void multiply_panel(const MatmulArgs& a, const Activations x, const float* panel,
                           int64_t first, int64_t rows) {
  for (int64_t m = 0; m < a.tokens; m += kTileM) {
    const float* tokens = x.data + m * x.stride;
    for (int64_t j = 0; j < rows; j += kTileN) {
      const float* w = panel + j * x.stride;
      const int tile_rows = int(min64(rows - j, kTileN));
      switch (min64(a.tokens - m, kTileM)) {
        case 1:
          multiply_tile<1>(a, tokens, w, x.stride, m, first + j, tile_rows);
          break;
        case 2:
          multiply_tile<2>(a, tokens, w, x.stride, m, first + j, tile_rows);
          break;
        case 3:
          multiply_tile<3>(a, tokens, w, x.stride, m, first + j, tile_rows);
          break;
        case 4:
          multiply_tile<4>(a, tokens, w, x.stride, m, first + j, tile_rows);
          break;
        case 5:
          multiply_tile<5>(a, tokens, w, x.stride, m, first + j, tile_rows);
          break;
        default:
          multiply_tile<6>(a, tokens, w, x.stride, m, first + j, tile_rows);
      }
    }
  }
}

template <int ELEMENT>
static void decode_panel(const PackedWeight& weight, int64_t first, int64_t rows, int64_t stride,
                         float* panel) {
  for (int64_t j = 0; j < rows; ++j) {
    const PackedRow row = weight.row(first + j);
    for (int64_t k = 0; k < weight.columns; k += kRun) {
      const int count = int(min64(weight.columns - k, kRun));
      decode_run<ELEMENT>(row, weight.format.group_size, k, count, panel + j * stride + k);
    }
  }
}

// Rows of a panel: a multiple of kTileN, of about kPanelBytes, and enough panels for all threads.
static int64_t panel_rows(int64_t rows, int64_t stride, int threads) {
  int64_t fit = kPanelBytes / (stride * int64_t(sizeof(float)));
  fit = min64(fit, (rows + threads - 1) / threads);
  return fit < kTileN ? kTileN : fit / kTileN * kTileN;
}

static bool multiply_panels(const MatmulArgs& a, const PackedWeight& weight, const Activations x,
                            bool serial) {
  const int threads = serial ? 1 : omp_get_max_threads();
  const int64_t height = panel_rows(a.rows, x.stride, threads), panel_size = height * x.stride;
  Scratch scratch(threads * panel_size * sizeof(float));
  if (!scratch.data) return false;
  // A tile beyond the last row reads a panel's leftovers, and its sums are dropped.
  memset(scratch.data, 0, threads * panel_size * sizeof(float));
#pragma omp parallel for schedule(dynamic) if (!serial)
  for (int64_t first = 0; first < a.rows; first += height) {
    const int64_t rows = min64(height, a.rows - first);
    float* panel = scratch.floats() + omp_get_thread_num() * panel_size;
    with_element(weight.format.element, [&](auto tag) {
      decode_panel<decltype(tag)::value>(weight, first, rows, x.stride, panel);
    });
    multiply_panel(a, x, panel, first, rows);
  }
  return true;
}

bool packed_matmul(const MatmulArgs& a) {
  const PackedWeight weight = {a.codes, a.scales, a.zero_points, a.columns,
                               decode_format(a.format)};
  const bool serial = a.tokens * a.rows * a.columns <= kSerialProducts;
#ifdef __AVX512VNNI__
  if (weight.format.element == kE2M1 && a.activation &&
      decode_format(a.activation).element == kE2M1) {
    bool done = false;
    if (!mxfp4_matmul(a, serial, &done)) return false;
    if (done) return true;
  }
#endif
  const int64_t stride = padded_stride(a.columns);
  Scratch scratch(a.tokens * stride * sizeof(float));
  if (!scratch.data) return false;
#pragma omp parallel for schedule(static) if (!serial && a.tokens > kFewTokens)
  for (int64_t m = 0; m < a.tokens; ++m) convert_token(a, m, scratch.floats() + m * stride);
  const Activations x = {scratch.floats(), stride};
  if (a.tokens > kFewTokens) return multiply_panels(a, weight, x, serial);
  with_element(weight.format.element,
               [&](auto tag) { dot_rows<decltype(tag)::value>(a, weight, x, serial); });
  return true;
}

}  // namespace MB_ISA
}  // namespace mixbits
