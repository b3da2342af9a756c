// Packed weight -> floats: one warp per run of 256 columns, 8 adjacent columns per lane, so that
// 16-bit values are written 16 bytes at a time. Per weight, bits / 8 bytes and a share of a scale
// are read and one value is written: 2.53 bytes for MXFP4 in 16 bits.
#include "cuda/codes/group.cuh"

namespace mixbits {
namespace cuda {
namespace {

constexpr int kColumns = 8;  // of a lane
constexpr int kWarpColumns = 32 * kColumns;

// The 8 codes from `column`, which begin at a byte; zeros beyond the end of the row.
template <int kBits>
__device__ inline uint64_t load_codes(const uint8_t* row, int64_t column, int64_t row_bytes,
                                      bool aligned) {
  const int64_t first = column / kColumns * kBits;
  uint64_t codes = 0;
  if (aligned) {
    Vector<uint8_t, kBits> bytes = *reinterpret_cast<const Vector<uint8_t, kBits>*>(row + first);
    memcpy(&codes, &bytes, kBits);
  } else {
    for (int i = 0; i < kBits; ++i) {
      if (first + i < row_bytes) codes |= uint64_t(row[first + i]) << (8 * i);
    }
  }
  return codes;
}

struct DequantizeShape {
  int64_t rows, columns, stride;  // of a row of the output
  int group_size;
  bool codes_aligned, out_aligned;
};

template <class T, int kElement>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const uint8_t* codes, const void* scales, const uint8_t* zero_points, T* out,
                      DequantizeShape shape) {
  constexpr int kBits = element_bits(kElement);
  const int lane = threadIdx.x % 32;
  const int64_t columns = shape.columns, row_bytes = packed_bytes(columns, kBits);
  const int64_t groups = group_count(columns, shape.group_size);
  const int64_t runs = (columns + kWarpColumns - 1) / kWarpColumns;
  const int64_t warps = int64_t(gridDim.x) * kWarps;
  int64_t w = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  for (; w < shape.rows * runs; w += warps) {
    const int64_t row = w / runs, column = w % runs * kWarpColumns + lane * kColumns;
    if (column >= columns) continue;
    const int64_t group = column / shape.group_size;
    const uint64_t lane_codes =
        load_codes<kBits>(codes + row * row_bytes, column, row_bytes, shape.codes_aligned);
    const float scale = load_scale<kElement>(scales, row * groups + group);
    const float offset = load_offset<kElement>(zero_points, row, group, groups);
    float values[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int code = int(lane_codes >> (i * kBits)) & ((1 << kBits) - 1);
      values[i] = decode<kElement>(code, offset) * scale;
    }
    store_columns(out + row * shape.stride, column, columns, shape.out_aligned, values);
  }
}

}  // namespace

const char* dequantize(const uint8_t* codes, const void* scales, const uint8_t* zero_points,
                       void* out, int64_t rows, int64_t columns, int64_t stride, int dtype,
                       int format, void* stream) {
  if (rows == 0 || columns == 0) return nullptr;
  const Format f = decode_format(format);
  const int bits = element_bits(f.element);
  DequantizeShape shape{rows, columns, stride, f.group_size, false, false};
  shape.codes_aligned =
      columns % kColumns == 0 && rows_aligned(codes, packed_bytes(columns, bits), bits);
  const unsigned grid = grid_for(rows * divide_up(columns, kWarpColumns));
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    shape.out_aligned =
        columns % kColumns == 0 && rows_aligned(out, stride * sizeof(T), kColumns * sizeof(T));
    dispatch_element(f.element, [&](auto element) {
      dequantize_kernel<T, element.value><<<grid, kThreads, 0, cudaStream_t(stream)>>>(
          codes, scales, zero_points, static_cast<T*>(out), shape);
    });
  });
  return launch_result();
}

}  // namespace cuda
}  // namespace mixbits
