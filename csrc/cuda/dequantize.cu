// Packed weight -> floats: one warp per run of 128 columns, 4 columns per lane.
#include "group.cuh"

namespace mixbits {
namespace cuda {
namespace {

template <class T, int kElement>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const uint8_t* codes, const void* scales, const uint8_t* zero_points, T* out,
                      int64_t rows, int64_t columns, int group_size, bool aligned) {
  constexpr int kBits = element_bits(kElement);
  constexpr int kBytes = kLaneColumns * kBits / 8;  // of a lane's codes, which begin at a byte
  const int lane = threadIdx.x % 32;
  const int64_t row_bytes = packed_bytes(columns, kBits);
  const int64_t groups = group_count(columns, group_size);
  const int64_t runs = (columns + kRun - 1) / kRun, warps = int64_t(gridDim.x) * kWarps;
  for (int64_t w = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; w < rows * runs; w += warps) {
    const int64_t row = w / runs, column = w % runs * kRun + lane * kLaneColumns;
    if (column >= columns) continue;
    const int64_t group = column / group_size, first = column / kLaneColumns * kBytes;
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kBytes; ++i) {
      if (first + i < row_bytes) word |= uint32_t(codes[row * row_bytes + first + i]) << (8 * i);
    }
    const float scale = load_scale<kElement>(scales, row * groups + group);
    const float offset = load_offset<kElement>(zero_points, row, group, groups);
    float values[kLaneColumns];
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const int code = (word >> (i * kBits)) & ((1 << kBits) - 1);
      values[i] = decode<kElement>(code, offset) * scale;
    }
    store_columns(out + row * columns, column, columns, aligned, values);
  }
}

}  // namespace

const char* dequantize(const uint8_t* codes, const void* scales, const uint8_t* zero_points,
                       void* out, int64_t rows, int64_t columns, int dtype, int format,
                       void* stream) {
  if (rows == 0 || columns == 0) return nullptr;
  const Format f = decode_format(format);
  const unsigned grid = grid_for(rows * divide_up(columns, kRun));
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool aligned = rows_aligned(out, columns * sizeof(T), kLaneColumns * sizeof(T));
    dispatch_element(f.element, [&](auto element) {
      dequantize_kernel<T, element.value><<<grid, kThreads, 0, cudaStream_t(stream)>>>(
          codes, scales, zero_points, static_cast<T*>(out), rows, columns, f.group_size, aligned);
    });
  });
  return launch_result();
}

}  // namespace cuda
}  // namespace mixbits
