// Sums of the quantization error over slabs of 32 columns, for several formats in one pass.
//
//   fisher     sum over rows o and a slab's columns k of  row_o * column_k * (W - Q(W))_ok^2
//   gradient   sum of  |G_ok * (W - Q(W))_ok|
//
// A block owns 128 columns (4 slabs) and every gridDim.y-th set of rows, one row per warp at a
// time, and writes its sums to its own place of a workspace; a second kernel adds the places in
// their order. No atomics: the same input gives the same bits. Errors and sums are doubles, as in
// the reference, from which only the order of additions differs.
//
// The running sums of a thread are in shared memory, one per format, because the loop over the
// formats is not unrolled: six kinds of elements times the number of formats would be.
#include "cuda/codes/group.cuh"

namespace mixbits {
namespace cuda {
namespace {

constexpr int kSlab = 32;
constexpr int kSlabLanes = kSlab / kLaneColumns;
constexpr int kRunSlabs = kRun / kSlab;
constexpr int kMaxRowBlocks = 64;  // bounds the workspace

struct FormatList {
  int codes[kMaxFormats];
  int count;
};

__device__ inline void run_round_trip(const float (&x)[kLaneColumns], const Format& format,
                                      float (&q)[kLaneColumns]) {
  dispatch_element(First(), format.element, [&](auto element) {
    const GroupScale group = group_scale<element.value>(x, format);
    for (int i = 0; i < kLaneColumns; ++i) q[i] = round_trip<element.value>(x[i], group);
  });
}

// G is the gradient's type, or void for the Fisher form.
template <class T, class G>
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(const T* weight, const G* gradient, const double* row_weight,
                      const double* column_weight, double* workspace, int64_t rows, int64_t columns,
                      FormatList formats, bool aligned, bool gradient_aligned) {
  constexpr bool kGradient = !std::is_void<G>::value;
  extern __shared__ double sums[];  // [formats, kThreads]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = int64_t(blockIdx.x) * kRun + lane * kLaneColumns;
  for (int f = 0; f < formats.count; ++f) sums[f * kThreads + threadIdx.x] = 0.0;

  for (int64_t row = int64_t(blockIdx.y) * kWarps + warp; row < rows;
       row += int64_t(gridDim.y) * kWarps) {
    float x[kLaneColumns], q[kLaneColumns];
    double factor[kLaneColumns];
    load_columns(weight + row * columns, column, columns, aligned, x);
    if constexpr (kGradient) {
      float g[kLaneColumns];
      load_columns(gradient + row * columns, column, columns, gradient_aligned, g);
      for (int i = 0; i < kLaneColumns; ++i) factor[i] = double(g[i]);
    } else {
      for (int i = 0; i < kLaneColumns; ++i) {
        factor[i] = column + i < columns ? row_weight[row] * column_weight[column + i] : 0.0;
      }
    }
#pragma unroll 1
    for (int f = 0; f < formats.count; ++f) {
      run_round_trip(x, decode_format(formats.codes[f]), q);
      double sum = 0.0;
      for (int i = 0; i < kLaneColumns; ++i) {
        const double error = double(x[i]) - double(q[i]);
        // Beyond the row the error is 0, or NaN in a group that is NaN as a whole.
        sum += kGradient ? fabs(factor[i] * error) : factor[i] * (error * error);
      }
      sums[f * kThreads + threadIdx.x] += sum;
    }
  }

  __syncthreads();
  const int64_t slabs = (columns + kSlab - 1) / kSlab;
  for (int i = threadIdx.x; i < formats.count * kRunSlabs; i += kThreads) {
    const int f = i / kRunSlabs, slab_lane = i % kRunSlabs * kSlabLanes;
    const int64_t slab = int64_t(blockIdx.x) * kRunSlabs + i % kRunSlabs;
    double total = 0.0;
    for (int t = 0; t < kWarps * kSlabLanes; ++t) {
      total += sums[f * kThreads + t / kSlabLanes * 32 + slab_lane + t % kSlabLanes];
    }
    if (slab < slabs) {
      workspace[(int64_t(blockIdx.y) * formats.count + f) * slabs + slab] = total;
    }
  }
}

// workspace [parts, size] -> out [size]
__global__ void sum_parts_kernel(const double* workspace, double* out, int64_t parts,
                                 int64_t size) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;
  double total = 0.0;
  for (int64_t part = 0; part < parts; ++part) total += workspace[part * size + i];
  out[i] = total;
}

template <class T, class G>
void launch(const StatisticsArgs& a, const FormatList& formats, cudaStream_t stream) {
  const dim3 grid(unsigned(divide_up(a.columns, kRun)),
                  unsigned(statistics_row_blocks(a.rows, a.columns)));
  const bool aligned = rows_aligned(a.weight, a.columns * sizeof(T), kLaneColumns * sizeof(T));
  bool gradient_aligned = false;
  if constexpr (!std::is_void<G>::value) {
    gradient_aligned = rows_aligned(a.gradient, a.columns * sizeof(G), kLaneColumns * sizeof(G));
  }
  const size_t shared = sizeof(double) * kThreads * formats.count;
  statistics_kernel<T, G><<<grid, kThreads, shared, stream>>>(
      static_cast<const T*>(a.weight), static_cast<const G*>(a.gradient), a.row_weight,
      a.column_weight, a.workspace, a.rows, a.columns, formats, aligned, gradient_aligned);
}

}  // namespace

int64_t statistics_row_blocks(int64_t rows, int64_t /*columns*/) {
  const int64_t blocks = divide_up(rows, kWarps);
  return blocks < kMaxRowBlocks ? blocks : kMaxRowBlocks;
}

const char* statistics(const StatisticsArgs& a, void* stream) {
  if (a.rows == 0 || a.columns == 0 || a.format_count == 0) return nullptr;
  if (a.format_count > kMaxFormats) return "at most 16 formats in one call";
  FormatList formats{};
  formats.count = a.format_count;
  for (int f = 0; f < a.format_count; ++f) {
    if (!has(First(), decode_format(a.formats[f]).element)) return kNoCode;
    formats.codes[f] = a.formats[f];
  }
  const cudaStream_t s = cudaStream_t(stream);
  dispatch_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (a.gradient == nullptr) {
      launch<T, void>(a, formats, s);
    } else {
      dispatch_dtype(a.gradient_dtype, [&](auto gradient_tag) {
        launch<T, typename decltype(gradient_tag)::type>(a, formats, s);
      });
    }
  });
  const int64_t size = a.format_count * divide_up(a.columns, kSlab);
  sum_parts_kernel<<<unsigned(divide_up(size, 128)), 128, 0, s>>>(
      a.workspace, a.out, statistics_row_blocks(a.rows, a.columns), size);
  return launch_result();
}

}  // namespace cuda
}  // namespace mixbits
