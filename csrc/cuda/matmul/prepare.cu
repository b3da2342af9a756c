// Activations -> what the matrix kernels multiply, in one pass: columns put in order, rotated, and
// fake-quantized where the scheme wants it; mixbits/formats/arrange.py is the slow twin. One warp
// per token and 128 columns of one segment. Reads x once and writes it once: as rows, or as the
// tiles that wgmma.cu reads, padded with zeros to whole tiles. In 16 bits fake-quantized
// values are exact (codes of at most 4 digits times a power of two, as fake_quantize writes them).
#include "cuda/codes/fragments.h"
#include "cuda/codes/group.cuh"

namespace mixbits {
namespace cuda {
namespace {

constexpr int kRotated = 32;  // columns that are rotated together

struct Run {  // of columns, which a segment of the weight has
  int first_column, end_column, end_tile, weight_bits;
  bool quantize;
  Format activation;
};

struct PrepareShape {
  Run runs[kMaxSegments];
  int tokens, columns, tiles, block_tokens;  // 0: rows
  const void* order;
  int order_bytes;
  bool rotated, aligned;
};

template <class T>
__device__ inline void fake_quantize_lane(float (&values)[kLaneColumns], const Format& format) {
  const auto round_all = [&](auto element) {
    const GroupScale group = group_scale<element.value>(values, format);
#pragma unroll
    // Rounded to T as fake_quantize rounds: a block's power of two may be too small for float16.
    for (float& v : values) v = to_float(from_float<T>(round_trip<element.value>(v, group)));
  };
  dispatch_element(Activations(), format.element, round_all);
}

__device__ inline int ordered_column(const PrepareShape& shape, int column) {
  if (shape.order_bytes == 1) return static_cast<const uint8_t*>(shape.order)[column];
  if (shape.order_bytes == 2) return static_cast<const uint16_t*>(shape.order)[column];
  return static_cast<const int*>(shape.order)[column];
}

// The sums and differences of mixbits.formats.arrange.hadamard, in its order: the lower two bits of
// a column's number are within a lane, the others are lanes.
__device__ inline void rotate_lanes(float (&v)[kLaneColumns]) {
  static_assert(kLaneColumns == 4, "two rounds");
  const float a[4] = {v[0] + v[1], v[0] - v[1], v[2] + v[3], v[2] - v[3]};
  v[0] = a[0] + a[2], v[1] = a[1] + a[3], v[2] = a[0] - a[2], v[3] = a[1] - a[3];
  for (int distance = 1; distance < kRotated / kLaneColumns; distance *= 2) {
#pragma unroll
    for (float& value : v) {
      const float other = __shfl_xor_sync(kAllLanes, value, distance);
      value = threadIdx.x & distance ? other - value : value + other;
    }
  }
}

template <class T>
__device__ inline void load_arranged(const T* row, int column, const Run& run,
                                     const PrepareShape& shape, bool inside,
                                     float (&values)[kLaneColumns]) {
  if (inside && shape.order == nullptr) {
    load_columns(row, column, run.end_column, shape.aligned, values);
  } else if (inside) {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const int at = column + i;
      if (at < run.end_column) values[i] = to_float(row[ordered_column(shape, at)]);
    }
  }
  if (!shape.rotated) return;
  float rotated[kLaneColumns] = {values[0], values[1], values[2], values[3]};
  rotate_lanes(rotated);
  if (column / kRotated * kRotated + kRotated > shape.columns) return;  // no whole block
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) values[i] = rotated[i];
}

template <class In, class Out>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const In* x, void* out, const __grid_constant__ PrepareShape shape) {
  static_assert(kRun == kPreparedColumns, "a warp's run is what a tile has");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int token = blockIdx.x, tile = blockIdx.y * kWarps + warp;
  if (tile >= shape.tiles) return;
  int s = 0;
  while (tile >= shape.runs[s].end_tile) ++s;
  const Run& run = shape.runs[s];
  const int first_tile = s == 0 ? 0 : shape.runs[s - 1].end_tile;
  const int column = run.first_column + (tile - first_tile) * kRun + lane * kLaneColumns;
  float values[kLaneColumns] = {};
  load_arranged(x + int64_t(token) * shape.columns, column, run, shape, token < shape.tokens,
                values);
  if (run.quantize) fake_quantize_lane<Out>(values, run.activation);
  if (shape.block_tokens == 0) {
    Out* const row = static_cast<Out*>(out) + int64_t(token) * shape.columns;
    store_columns(row, column, run.end_column, shape.aligned, values);
    return;
  }
  if constexpr (sizeof(Out) == 2) {
    __shared__ __align__(16) Out prepared[kWarps][kPreparedColumns];
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const int position = prepared_position(run.weight_bits, lane * kLaneColumns + i);
      prepared[warp][position] = from_float<Out>(values[i]);
    }
    __syncwarp();
    // Half a 16-byte piece per lane: a warp writes two whole rows of 128 bytes.
    const int block = token / shape.block_tokens, place = token % shape.block_tokens;
    uint8_t* target = static_cast<uint8_t*>(out) +
                      (int64_t(block) * shape.tiles + tile) * shape.block_tokens * kRun * 2;
    *reinterpret_cast<Vector<uint32_t, 2>*>(target +
                                            prepared_byte(shape.block_tokens, place, lane * 4)) =
        *reinterpret_cast<const Vector<uint32_t, 2>*>(&prepared[warp][lane * 4]);
  }
}

// Calls function(TypeTag<In>, TypeTag<Out>) for what there is: Out is In, or float.
template <class Function>
void dispatch_pair(int dtype, int out_dtype, Function function) {
  dispatch_dtype(dtype, [&](auto in) {
    if (out_dtype == dtype) {
      function(in, in);
    } else if (out_dtype == kFloat32) {
      function(in, TypeTag<float>());
    }
  });
}

}  // namespace

int64_t prepared_bytes(int64_t tokens, int64_t columns, int block_tokens) {
  return divide_up(tokens, block_tokens) * block_tokens * divide_up(columns, kRun) * kRun * 2;
}

const char* prepare_activations(const PrepareArgs& a, void* stream) {
  if (a.tokens == 0 || a.columns == 0) return nullptr;
  if (a.segment_count < 1 || a.segment_count > kMaxSegments) return "1 to 8 segments";
  if (a.block_tokens != 0 && a.out_dtype == kFloat32) return "tiles are of 16-bit values";
  PrepareShape shape{};
  int64_t column = 0;
  for (int i = 0; i < a.segment_count; ++i) {
    const SegmentArgs& s = a.segments[i];
    const Format activation = decode_format(s.activation);
    if (s.activation != 0 && !has(Activations(), activation.element)) return kNoCode;
    if (column % kRotated != 0) return "segments must begin at multiples of 32 columns";
    shape.tiles += int(divide_up(s.columns, kRun));
    shape.runs[i] = {int(column),       int(column + s.columns),
                     shape.tiles,       element_bits(decode_format(s.format).element),
                     s.activation != 0, activation};
    column += s.columns;
  }
  if (column != a.columns) return "segments must share all columns";
  shape.tokens = int(a.tokens), shape.columns = int(a.columns);
  shape.block_tokens = a.block_tokens;
  shape.order = a.order, shape.order_bytes = a.order_bytes, shape.rotated = a.rotated;
  const int64_t padded =
      a.block_tokens == 0 ? a.tokens : divide_up(a.tokens, a.block_tokens) * a.block_tokens;
  const dim3 grid(unsigned(padded), unsigned(divide_up(shape.tiles, kWarps)));
  dispatch_pair(a.dtype, a.out_dtype, [&](auto in, auto out) {
    using In = typename decltype(in)::type;
    using Out = typename decltype(out)::type;
    shape.aligned = rows_aligned(a.x, a.columns * sizeof(In), kLaneColumns * sizeof(In)) &&
                    rows_aligned(a.out, a.columns * sizeof(Out), kLaneColumns * sizeof(Out));
    prepare_kernel<In, Out>
        <<<grid, kThreads, 0, cudaStream_t(stream)>>>(static_cast<const In*>(a.x), a.out, shape);
  });
  return launch_result();
}

}  // namespace cuda
}  // namespace mixbits
