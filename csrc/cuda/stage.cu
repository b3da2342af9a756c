// Activations -> the tiles that matmul_wgmma.cu multiplies, fake-quantized on the way where the
// scheme quantizes them: one warp per token and 128 columns. Reads x once and writes it once in 16
// bits (exact: codes of at most 4 digits times a power of two, as fake_quantize writes them),
// padded with zeros to whole tiles.
#include "fragments.h"
#include "group.cuh"

namespace mixbits {
namespace cuda {
namespace {

struct StageShape {
  int tokens, columns, block_tokens, weight_bits;
  bool quantize, aligned;
};

template <class T>
__device__ inline void fake_quantize_lane(float (&values)[kLaneColumns], const Format& format) {
  const auto round_all = [&](auto element) {
    const GroupScale group = group_scale<element.value>(values, format);
#pragma unroll
    // Rounded to T as fake_quantize rounds: a block's power of two may be too small for float16.
    for (float& v : values) v = to_float(from_float<T>(round_trip<element.value>(v, group)));
  };
  if (format.element == kE2M1) round_all(std::integral_constant<int, kE2M1>());
  if (format.element == kE4M3) round_all(std::integral_constant<int, kE4M3>());
  if (format.element == kE5M2) round_all(std::integral_constant<int, kE5M2>());
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    stage_kernel(const T* x, uint8_t* out, StageShape shape, Format activation) {
  __shared__ __align__(16) T staged[kWarps][kStagedColumns];
  static_assert(kRun == kStagedColumns && sizeof(T) == 2, "a warp's run is what a tile has");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tiles = (shape.columns + kRun - 1) / kRun;
  const int token = blockIdx.y, tile = blockIdx.x * kWarps + warp;
  if (tile >= tiles) return;
  const int column = tile * kRun + lane * kLaneColumns;
  float values[kLaneColumns] = {};
  if (token < shape.tokens) {
    load_columns(x + int64_t(token) * shape.columns, column, shape.columns, shape.aligned, values);
  }
  if (shape.quantize) fake_quantize_lane<T>(values, activation);
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    const int position = staged_position(shape.weight_bits, lane * kLaneColumns + i);
    staged[warp][position] = from_float<T>(values[i]);
  }
  __syncwarp();
  // Half a 16-byte piece per lane: a warp writes two whole rows of 128 bytes.
  const int block = token / shape.block_tokens, place = token % shape.block_tokens;
  uint8_t* target = out + (int64_t(block) * tiles + tile) * shape.block_tokens * kRun * 2;
  *reinterpret_cast<Vector<uint32_t, 2>*>(target +
                                          staged_byte(shape.block_tokens, place, lane * 4)) =
      *reinterpret_cast<const Vector<uint32_t, 2>*>(&staged[warp][lane * 4]);
}

}  // namespace

int64_t staged_bytes(int64_t tokens, int64_t columns, int block_tokens) {
  return divide_up(tokens, block_tokens) * block_tokens * divide_up(columns, kRun) * kRun * 2;
}

const char* stage_activations(const void* x, void* out, int64_t tokens, int64_t columns, int dtype,
                              int weight_format, int activation, int block_tokens, void* stream) {
  if (tokens == 0 || columns == 0) return nullptr;
  const Format weight = decode_format(weight_format), format = decode_format(activation);
  if (activation != 0 && !is_mx(format.element)) return "activations are MX or left alone";
  const int64_t padded = divide_up(tokens, block_tokens) * block_tokens;
  if (padded > 65535) return "at most 65535 tokens in one call";
  const StageShape shape{int(tokens),     int(columns),
                         block_tokens,    element_bits(weight.element),
                         activation != 0, rows_aligned(x, columns * 2, kLaneColumns * 2)};
  const dim3 grid(unsigned(divide_up(divide_up(columns, kRun), kWarps)), unsigned(padded));
  dispatch_half(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    stage_kernel<T><<<grid, kThreads, 0, cudaStream_t(stream)>>>(
        static_cast<const T*>(x), static_cast<uint8_t*>(out), shape, format);
  });
  return launch_result();
}

}  // namespace cuda
}  // namespace mixbits
