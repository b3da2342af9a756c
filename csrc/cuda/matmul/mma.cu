// x [tokens, columns] times a packed weight [rows, columns] transposed, on the matrix units of
// sm_80 and later, for few tokens: reading the weight is the cost.
//
// The weight is the 16-row operand of mma.m16n8k16 and 8 tokens are the other, so that one token
// wastes no more of a fragment than eight. A block owns 16 to 64 rows of the weight and 8 or 16
// tokens. Its warps walk along the rows side by side, one tile of 128 columns each, so that the
// block reads its rows in runs of a kilobyte or more. A lane loads 16 bytes of a row at a time, as
// they lie in the file, and dequantizes them in registers (chunk.cuh): no shared memory, no
// barrier until the end, and several loads under way per lane. At 3 TB/s and 700 ns, 132 SMs need
// 16 KB each under way; 12 warps with 4 chunks of 16 bytes per lane and row have 48.
//
// The warps' sums are added in shared memory in the order of the warps: the same input gives the
// same bits, and nothing is shared between blocks. fp32 sums, as torch's.
#include "cuda/codes/chunk.cuh"

namespace mixbits {
namespace cuda {
namespace {

// Of a block; an SM then has 128, 168 or 255 registers for each of their threads.
MB_HD constexpr int max_warps(int row_tiles, int token_tiles) {
  return row_tiles == 1 ? 16 : token_tiles == 1 ? 12 : 8;
}
constexpr int kFragmentRows = 16;
constexpr int kFragmentTokens = 8;

// 16 columns of activations, adjacent in memory, as 8 pairs in the order of pair_column; a chunk
// of 32 is two such halves.
constexpr int kHalfPairs = 8;

template <int kBits, int... kIndex>
__device__ __forceinline__ void order_pairs(const uint32_t (&x)[kHalfPairs],
                                            uint32_t (&pairs)[kHalfPairs],
                                            std::integer_sequence<int, kIndex...>) {
  // 0x5410 joins two low halves, 0x7632 two high ones.
  ((pairs[kIndex] =
        __byte_perm(x[pair_column(kBits, kIndex, 0) / 2], x[pair_column(kBits, kIndex, 1) / 2],
                    pair_column(kBits, kIndex, 0) % 2 ? 0x7632 : 0x5410)),
   ...);
}

// Tokens that a weight, or a segment of one, is multiplied with: `x` is column 0 of the first, and
// each begins `stride` values after the one before.
template <class T>
struct TokenRows {
  const T* x;
  int count, stride;
};

// The activations of token `token` from `column`; zeros beyond either end.
template <class T, int kBits>
__device__ __forceinline__ void load_token(const TokenRows<T>& tokens, int token, int column,
                                           int columns, uint32_t (&pairs)[kHalfPairs]) {
  uint32_t words[kHalfPairs] = {};
  if (token < tokens.count && column < columns) {
    const auto* source = reinterpret_cast<const Vector<uint32_t, 4>*>(
        tokens.x + int64_t(token) * tokens.stride + column);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto part = source[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) words[i * 4 + j] = part.values[j];
    }
  }
  order_pairs<kBits>(words, pairs, std::make_integer_sequence<int, kHalfPairs>());
}

// Adds the products of one half of a chunk: 4 steps.
template <class T, int kElement, int kHalf, int kTokenTiles>
__device__ __forceinline__ void add_half(const Chunk<kElement> (&rows)[2], int zero_at,
                                         const uint32_t (&b)[kTokenTiles][kHalfPairs],
                                         float (&c)[kTokenTiles][4]) {
  uint32_t upper[kHalfPairs], lower[kHalfPairs];
  decode_pairs<T, kElement, kHalf * kHalfPairs>(rows[0], zero_at, upper);
  decode_pairs<T, kElement, kHalf * kHalfPairs>(rows[1], zero_at, lower);
#pragma unroll
  for (int i = 0; i < kHalfPairs; i += 2) {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      ptx::mma<T>(c[t], upper[i], lower[i], upper[i + 1], lower[i + 1], b[t][i], b[t][i + 1]);
    }
  }
}

// Sums of a warp: fragments of 16 rows by 8 tokens.
template <int kRowTiles, int kTokenTiles>
using WarpSums = float[kRowTiles][kTokenTiles][4];

// Adds the products of every `warps`-th tile of the weight's columns, from number `warp` on.
template <class T, int kElement, int kRowTiles, int kTokenTiles>
__device__ __forceinline__ void add_tiles(const TokenRows<T>& tokens, const PackedWeight& weight,
                                          int warp, int warps,
                                          WarpSums<kRowTiles, kTokenTiles>& c) {
  constexpr int kBits = element_bits(kElement);
  constexpr int kChunk = chunk_columns(kBits), kTile = tile_columns(kBits);
  constexpr int kAhead = 4 / kRowTiles;  // tiles of which the weight is loaded in advance
  const int lane = threadIdx.x % 32, group = lane / 4, chunk_column = lane % 4 * kChunk;
  const int first_row = blockIdx.x * (kRowTiles * kFragmentRows);
  const int first_token = blockIdx.y * (kTokenTiles * kFragmentTokens);
  const int columns = weight.columns;

  Chunk<kElement> chunks[kAhead][kRowTiles][2];
  uint32_t rows[kRowTiles][2];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    rows[r][0] = valid_row(weight, first_row + r * kFragmentRows + group);
    rows[r][1] = valid_row(weight, first_row + r * kFragmentRows + 8 + group);
  }
  const auto load_rows = [&](Chunk<kElement>(&pair)[2], int r, int tile) {
    load_chunk<kElement>(weight, rows[r][0], tile * kTile + chunk_column, pair[0]);
    load_chunk<kElement>(weight, rows[r][1], tile * kTile + chunk_column, pair[1]);
  };

#pragma unroll
  for (int ahead = 0; ahead < kAhead; ++ahead) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) load_rows(chunks[ahead][r], r, warp + ahead * warps);
  }
  for (int first = warp; first * kTile < columns; first += kAhead * warps) {
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      const int tile = first + ahead * warps;
      if (tile * kTile >= columns) break;
      const int zero_at = zero_shift<kElement>(weight, tile * kTile + chunk_column);
      const auto load_tokens = [&](int half, uint32_t (&b)[kTokenTiles][kHalfPairs]) {
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          load_token<T, kBits>(tokens, first_token + t * kFragmentTokens + group,
                               tile * kTile + chunk_column + half * 2 * kHalfPairs, columns, b[t]);
        }
      };
      uint32_t b[kTokenTiles][kHalfPairs];
      if constexpr (kChunk == 32) {
        load_tokens(0, b);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          add_half<T, kElement, 0>(chunks[ahead][r], zero_at, b, c[r]);
        }
      }
      constexpr int kLast = kChunk / 16 - 1;
      load_tokens(kLast, b);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        add_half<T, kElement, kLast>(chunks[ahead][r], zero_at, b, c[r]);
        load_rows(chunks[ahead][r], r, tile + kAhead * warps);
      }
    }
  }
  if constexpr (kElement == kNVE2M1) {
    const float factor = NVPairs<T, 0>::kLeft / *weight.divisor;
#pragma unroll
    for (auto& row_sums : c) {
#pragma unroll
      for (auto& fragment : row_sums) {
#pragma unroll
        for (float& sum : fragment) sum *= factor;
      }
    }
  }
}

// Adds up the sums of the block's warps, in their order, and writes them.
template <class T, int kRowTiles, int kTokenTiles>
__device__ __forceinline__ void store_sums(const WarpSums<kRowTiles, kTokenTiles>& c, T* out,
                                           int rows, int tokens) {
  constexpr int kTokens = kTokenTiles * kFragmentTokens;
  __shared__ float sums[max_warps(kRowTiles, kTokenTiles)][kTokens][kFragmentRows + 1];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = blockIdx.x * (kRowTiles * kFragmentRows);
  const int first_token = blockIdx.y * kTokens;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    __syncthreads();
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = t * kFragmentTokens + lane % 4 * 2 + i % 2;
        sums[warp][token][i / 2 * 8 + lane / 4] = c[r][t][i];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTokens * kFragmentRows; i += blockDim.x) {
      const int token = i / kFragmentRows, row = i % kFragmentRows;
      float total = 0.0f;
      for (int w = 0; w < warps; ++w) total += sums[w][token][row];
      const int out_row = first_row + r * kFragmentRows + row;
      if (first_token + token < tokens && out_row < rows) {
        out[int64_t(first_token + token) * rows + out_row] = from_float<T>(total);
      }
    }
  }
}

template <class T, int kElement, int kRowTiles, int kTokenTiles>
__global__ void __launch_bounds__(32 * max_warps(kRowTiles, kTokenTiles))
    mma_kernel(const T* x, PackedWeight weight, T* out, int tokens) {
  WarpSums<kRowTiles, kTokenTiles> c = {};
  add_tiles<T, kElement, kRowTiles, kTokenTiles>({x, tokens, weight.columns}, weight,
                                                 threadIdx.x / 32, blockDim.x / 32, c);
  store_sums<T, kRowTiles, kTokenTiles>(c, out, weight.rows, tokens);
}

// Segments of a weight: each has warps of its own, so that the loads of all are under way at once,
// and a warp meets one format. One kernel takes all formats: a warp jumps to the code for its own.
template <class T, int kRowTiles, int kTokenTiles>
__global__ void __launch_bounds__(32 * max_warps(kRowTiles, kTokenTiles))
    mixed_mma_kernel(const T* x, const __grid_constant__ MixedWeight mix, T* out, int tokens) {
  WarpSums<kRowTiles, kTokenTiles> c = {};
  const int warp = threadIdx.x / 32;
  int s = 0;
  while (warp >= mix.segments[s].end) ++s;
  const Segment& segment = mix.segments[s];
  dispatch_element(First(), segment.element, [&](auto element) {
    add_tiles<T, element.value, kRowTiles, kTokenTiles>(
        {x + segment.first_column, tokens, mix.columns}, segment.weight, warp - segment.first,
        segment.end - segment.first, c);
  });
  store_sums<T, kRowTiles, kTokenTiles>(c, out, mix.segments[0].weight.rows, tokens);
}

template <class T, int kElement, int kRowTiles, int kTokenTiles>
void launch(const MatmulArgs& a, const PackedWeight& weight, int warps, cudaStream_t stream) {
  const dim3 grid(unsigned(divide_up(a.rows, kRowTiles * kFragmentRows)),
                  unsigned(divide_up(a.tokens, kTokenTiles * kFragmentTokens)));
  mma_kernel<T, kElement, kRowTiles, kTokenTiles><<<grid, 32 * warps, 0, stream>>>(
      static_cast<const T*>(a.x), weight, static_cast<T*>(a.out), int(a.tokens));
}

// A block's warps divided among segments by the bytes of a row, one at least for each.
void divide_warps(MixedWeight* mix, int warps) {
  int64_t tiles_left = 0;
  const auto tiles = [&](const Segment& s) {
    return divide_up(s.weight.columns, tile_columns(element_bits(s.element)));
  };
  for (int i = 0; i < mix->count; ++i) tiles_left += tiles(mix->segments[i]);
  for (int i = 0, first = 0; i < mix->count; ++i) {
    Segment& segment = mix->segments[i];
    const int64_t own = tiles(segment), after = mix->count - 1 - i;
    const int64_t share = (2 * own * (warps - first) + tiles_left) / (2 * tiles_left);  // rounded
    segment.first = first;
    first += int(max(int64_t(1), min(share, warps - first - after)));
    segment.end = first;
    tiles_left -= own;
  }
}

template <class T, int kRowTiles, int kTokenTiles>
void launch_mixed(const MatmulArgs& a, const MixedWeight& mix, int warps, cudaStream_t stream) {
  const dim3 grid(unsigned(divide_up(a.rows, kRowTiles * kFragmentRows)),
                  unsigned(divide_up(a.tokens, kTokenTiles * kFragmentTokens)));
  mixed_mma_kernel<T, kRowTiles, kTokenTiles><<<grid, 32 * warps, 0, stream>>>(
      static_cast<const T*>(a.x), mix, static_cast<T*>(a.out), int(a.tokens));
}

const char* multiply_one(const MatmulArgs& a, int row_tiles, int token_tiles, int warps,
                         cudaStream_t stream) {
  PackedWeight weight{};
  if (!has(Multiplied(), element_of(a.segments[0]))) return kNoCode;
  if (const char* error = packed_weight(a.segments[0], a.rows, &weight)) return error;
  const char* error = "no kernel of these sizes";
  dispatch_half(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_element(Multiplied(), element_of(a.segments[0]), [&](auto element) {
      constexpr int kElement = element.value;
      error = nullptr;
      if (row_tiles == 1 && token_tiles == 1) {
        launch<T, kElement, 1, 1>(a, weight, warps, stream);
      } else if (row_tiles == 4 && token_tiles == 1) {
        launch<T, kElement, 4, 1>(a, weight, warps, stream);
      } else if (row_tiles == 4 && token_tiles == 2) {
        launch<T, kElement, 4, 2>(a, weight, warps, stream);
      } else {
        error = "no kernel of these sizes";
      }
    });
  });
  return error;
}

const char* multiply_several(const MatmulArgs& a, int row_tiles, int token_tiles, int warps,
                             cudaStream_t stream) {
  MixedWeight mix{};
  if (const char* error = mixed_weight(a, &mix)) return error;
  divide_warps(&mix, warps);
  const char* error = "no kernel of these sizes";
  dispatch_half(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    error = nullptr;
    if (row_tiles == 1 && token_tiles == 1) {
      launch_mixed<T, 1, 1>(a, mix, warps, stream);
    } else if (row_tiles == 4 && token_tiles == 1) {
      launch_mixed<T, 4, 1>(a, mix, warps, stream);
    } else {
      error = "no kernel of these sizes";
    }
  });
  return error;
}

}  // namespace

const char* packed_matmul_mma(const MatmulArgs& a, int row_tiles, int token_tiles, int warps,
                              void* stream) {
  if (a.tokens == 0 || a.rows == 0 || a.columns == 0) return nullptr;
  if (const char* error = refused_segments(a)) return error;
  if (warps < a.segment_count || warps > max_warps(row_tiles, token_tiles)) {
    return "too many warps, or too few";
  }
  if (!rows_aligned(a.x, a.columns * 2, 16)) return "x must be aligned to 16 bytes";
  const auto multiply = a.segment_count == 1 ? multiply_one : multiply_several;
  const char* error = multiply(a, row_tiles, token_tiles, warps, cudaStream_t(stream));
  return error == nullptr ? launch_result() : error;
}

}  // namespace cuda
}  // namespace mixbits
