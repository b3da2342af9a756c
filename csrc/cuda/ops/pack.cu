// Quantize a weight and pack it: floats are read once, codes, scales and zero points written.
//
// A warp owns a chunk of a row: one run of 128 columns, or as many as fill a byte of packed zero
// points, so that no two warps write to the same byte.
#include "cuda/codes/group.cuh"

namespace mixbits {
namespace cuda {
namespace {

// The 4 codes of a lane are 8, 16 or 32 bits, and begin at a byte.
template <int kBits>
__device__ inline void store_codes(uint8_t* row, int64_t column, int64_t row_bytes, bool aligned,
                                   const int (&codes)[kLaneColumns]) {
  constexpr int kBytes = kLaneColumns * kBits / 8;
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) word |= uint32_t(codes[i]) << (i * kBits);
  const int64_t first = column / kLaneColumns * kBytes;
  if (aligned && first < row_bytes) {
    if constexpr (kBytes == 4) *reinterpret_cast<uint32_t*>(row + first) = word;
    if constexpr (kBytes == 2) *reinterpret_cast<uint16_t*>(row + first) = uint16_t(word);
    if constexpr (kBytes == 1) row[first] = uint8_t(word);
  } else {
#pragma unroll
    for (int i = 0; i < kBytes; ++i) {
      if (first + i < row_bytes) row[first + i] = uint8_t(word >> (8 * i));
    }
  }
}

struct PackShape {
  int64_t rows, columns;
  int chunk;  // columns of one warp
  bool weight_aligned, codes_aligned;
};

template <class T, int kElement>
__global__ void __launch_bounds__(kThreads)
    quantize_pack_kernel(const T* weight, uint8_t* codes, void* scales, uint8_t* zero_points,
                         PackShape shape, Format format) {
  constexpr int kBits = element_bits(kElement);
  const int lane = threadIdx.x % 32, group_lanes = format.group_size / kLaneColumns;
  const int64_t columns = shape.columns, groups = group_count(columns, format.group_size);
  const int64_t row_bytes = packed_bytes(columns, kBits);
  const int64_t chunks = (columns + shape.chunk - 1) / shape.chunk;
  const int64_t warps = int64_t(gridDim.x) * kWarps;
  int64_t w = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  for (; w < shape.rows * chunks; w += warps) {
    const int64_t row = w / chunks, start = w % chunks * shape.chunk;
    uint32_t chunk_zero_points = 0;  // at most 32 bits: 4 groups, or one byte's worth of them
    for (int run = 0; run < shape.chunk; run += kRun) {
      const int64_t column = start + run + lane * kLaneColumns;
      float values[kLaneColumns];
      load_columns(weight + row * columns, column, columns, shape.weight_aligned, values);
      const GroupScale group = group_scale<kElement>(values, format);
      int lane_codes[kLaneColumns];
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) {
        lane_codes[i] = column + i < columns ? encode<kElement>(values[i], group) : 0;
      }
      store_codes<kBits>(codes + row * row_bytes, column, row_bytes, shape.codes_aligned,
                         lane_codes);
      if (lane % group_lanes == 0 && column < columns) {  // the group's first lane
        const int64_t place = row * groups + column / format.group_size;
        if constexpr (is_mx(kElement)) {
          static_cast<uint8_t*>(scales)[place] = uint8_t(group.stored);
        } else {
          static_cast<uint16_t*>(scales)[place] = uint16_t(group.stored);
          const int in_chunk = (run + lane * kLaneColumns) / format.group_size;
          const int zero = group.finite ? small_to_int<float, int32_t>(group.factor) : 0;
          chunk_zero_points |= uint32_t(zero) << (in_chunk * kBits);
        }
      }
    }
    if (zero_points != nullptr) {
      chunk_zero_points =
          combine_lanes(chunk_zero_points, 32, [](uint32_t a, uint32_t b) { return a | b; });
      const int chunk_bytes = shape.chunk / format.group_size * kBits / 8;
      const int64_t zero_bytes = packed_bytes(groups, kBits);
      const int64_t byte = w % chunks * chunk_bytes + lane;
      if (lane < chunk_bytes && byte < zero_bytes) {
        zero_points[row * zero_bytes + byte] = uint8_t(chunk_zero_points >> (8 * lane));
      }
    }
  }
}

}  // namespace

const char* quantize_pack(const void* weight, uint8_t* codes, void* scales, uint8_t* zero_points,
                          int64_t rows, int64_t columns, int dtype, int format, void* stream) {
  if (rows == 0 || columns == 0) return nullptr;
  const Format f = decode_format(format);
  if (!has(First(), f.element)) return kNoCode;
  const int bits = element_bits(f.element);
  const int byte_columns = f.group_size * (8 / bits);  // of one byte of zero points
  const bool wide = zero_points != nullptr && byte_columns > kRun;
  PackShape shape{rows, columns, wide ? byte_columns : kRun, false, false};
  shape.codes_aligned = columns % kLaneColumns == 0 &&
                        rows_aligned(codes, packed_bytes(columns, bits), kLaneColumns * bits / 8);
  const unsigned grid = grid_for(rows * divide_up(columns, shape.chunk));
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    shape.weight_aligned = rows_aligned(weight, columns * sizeof(T), kLaneColumns * sizeof(T));
    dispatch_element(First(), f.element, [&](auto element) {
      quantize_pack_kernel<T, element.value><<<grid, kThreads, 0, cudaStream_t(stream)>>>(
          static_cast<const T*>(weight), codes, scales, zero_points, shape, f);
    });
  });
  return launch_result();
}

}  // namespace cuda
}  // namespace mixbits
