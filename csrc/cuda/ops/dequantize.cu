// Packed weight -> floats: one warp per run of 256 columns, 8 adjacent columns per lane, so that
// 16-bit values are written 16 bytes at a time. Per weight, bits / 8 bytes and a share of a scale
// are read and one value is written: 2.53 bytes for MXFP4 in 16 bits.
#include "cuda/codes/group.cuh"

namespace mixbits {
namespace cuda {
namespace {

constexpr int kColumns = 8;  // of a lane
constexpr int kWarpColumns = 32 * kColumns;

// The 8 codes from `column` of a plane, which begin at a byte; zeros beyond its `size` bytes.
template <int kBits>
__device__ inline uint64_t load_codes(const uint8_t* plane, int64_t column, int64_t size,
                                      bool aligned) {
  const int64_t first = column / kColumns * kBits;
  uint64_t codes = 0;
  if (aligned) {
    Vector<uint8_t, kBits> bytes = *reinterpret_cast<const Vector<uint8_t, kBits>*>(plane + first);
    memcpy(&codes, &bytes, kBits);
  } else {
    for (int i = 0; i < kBits; ++i) {
      if (first + i < size) codes |= uint64_t(plane[first + i]) << (8 * i);
    }
  }
  return codes;
}

// Code number i of those.
template <int kBits>
__device__ inline int code_of(uint64_t codes, int i) {
  return int(codes >> (i * kBits)) & ((1 << kBits) - 1);
}

struct DequantizeShape {
  int64_t rows, columns, stride;  // of a row of the output
  int group_size;
  int64_t groups;  // scales of a row
  bool codes_aligned, out_aligned;
};

template <class T, int kElement>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const PackedArgs packed, T* out, DequantizeShape shape) {
  constexpr int kBits = element_bits(kElement), kLow = lower_bits(kBits), kHigh = kBits - kLow;
  const int lane = threadIdx.x % 32;
  const int64_t columns = shape.columns, row_bytes = packed_bytes(columns, kBits);
  const int64_t lower_bytes = upper_plane(columns, kBits);
  const int64_t runs = (columns + kWarpColumns - 1) / kWarpColumns;
  const int64_t warps = int64_t(gridDim.x) * kWarps;
  int64_t w = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  for (; w < shape.rows * runs; w += warps) {
    const int64_t row = w / runs, column = w % runs * kWarpColumns + lane * kColumns;
    if (column >= columns) continue;
    const int64_t group = column / shape.group_size;
    const uint8_t* const codes = packed.codes + row * row_bytes;
    const uint64_t lower = load_codes<kLow>(codes, column, lower_bytes, shape.codes_aligned);
    uint64_t upper = 0;
    if constexpr (kHigh != 0) {
      upper = load_codes<kHigh>(codes + lower_bytes, column, row_bytes - lower_bytes,
                                shape.codes_aligned);
    }
    const float scale = load_scale<kElement>(packed, row, group, shape.groups);
    const float offset = load_offset<kElement>(packed, row, group, shape.groups);
    float values[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int code = code_of<kLow>(lower, i) | code_of<kHigh>(upper, i) << kLow;
      values[i] = decode<kElement>(code, offset) * scale;
    }
    store_columns(out + row * shape.stride, column, columns, shape.out_aligned, values);
  }
}

}  // namespace

const char* dequantize(const SegmentArgs& weight, void* out, int64_t rows, int64_t stride,
                       int dtype, void* stream) {
  const int64_t columns = weight.columns;
  if (rows == 0 || columns == 0) return nullptr;
  const Format f = decode_format(weight.format);
  if (!has(Decoded(), f.element)) return kNoCode;
  const int bits = element_bits(f.element);
  DequantizeShape shape{rows, columns, stride, f.group_size, scale_count(columns, f), false, false};
  // Whole pieces of the lower plane: those of the upper one are half as long, or a quarter.
  shape.codes_aligned =
      columns % kColumns == 0 &&
      rows_aligned(weight.packed.codes, packed_bytes(columns, bits), lower_bits(bits));
  const unsigned grid = grid_for(rows * divide_up(columns, kWarpColumns));
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    shape.out_aligned =
        columns % kColumns == 0 && rows_aligned(out, stride * sizeof(T), kColumns * sizeof(T));
    dispatch_element(Decoded(), f.element, [&](auto element) {
      dequantize_kernel<T, element.value>
          <<<grid, kThreads, 0, cudaStream_t(stream)>>>(weight.packed, static_cast<T*>(out), shape);
    });
  });
  return launch_result();
}

}  // namespace cuda
}  // namespace mixbits
