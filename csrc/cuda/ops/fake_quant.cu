// Fake quantization: every group goes through its codes and back. One warp per run of 128
// columns; x is read once and written once.
#include "cuda/codes/group.cuh"

namespace mixbits {
namespace cuda {
namespace {

template <class T, int kElement>
__global__ void __launch_bounds__(kThreads)
    fake_quantize_kernel(const T* x, T* out, int64_t rows, int64_t columns, Format format,
                         bool aligned) {
  const int lane = threadIdx.x % 32;
  const int64_t runs = (columns + kRun - 1) / kRun, warps = int64_t(gridDim.x) * kWarps;
  for (int64_t w = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; w < rows * runs; w += warps) {
    const int64_t row = w / runs, column = w % runs * kRun + lane * kLaneColumns;
    float values[kLaneColumns];
    load_columns(x + row * columns, column, columns, aligned, values);
    const GroupScale group = group_scale<kElement>(values, format);
#pragma unroll
    for (float& value : values) value = round_trip<kElement>(value, group);
    store_columns(out + row * columns, column, columns, aligned, values);
  }
}

}  // namespace

const char* fake_quantize(const void* x, void* out, int64_t rows, int64_t columns, int dtype,
                          int format, void* stream) {
  if (rows == 0 || columns == 0) return nullptr;
  const Format f = decode_format(format);
  if (!has(First(), f.element)) return kNoCode;
  const unsigned grid = grid_for(rows * divide_up(columns, kRun));
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kBytes = kLaneColumns * sizeof(T);
    const bool aligned = rows_aligned(x, columns * sizeof(T), kBytes) &&
                         rows_aligned(out, columns * sizeof(T), kBytes);
    dispatch_element(First(), f.element, [&](auto element) {
      fake_quantize_kernel<T, element.value><<<grid, kThreads, 0, cudaStream_t(stream)>>>(
          static_cast<const T*>(x), static_cast<T*>(out), rows, columns, f, aligned);
    });
  });
  return launch_result();
}

const char* why_unusable() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, fake_quantize_kernel<float, kE2M1>);
  cudaGetLastError();  // a failed question must not become the next launch's error
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace mixbits
