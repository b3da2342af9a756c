// MXFP4 weights folded to e4m3 times activations rounded to e4m3, on Hopper's warpgroup matrix
// units (sm_90a), which take 8-bit floats at twice the rate of 16-bit ones. The weights stay exact
// (fold.h); of the activations 4 digits are left, and one scale per token.
//
// `prepare_e4m3` reads a token twice, the second time from a cache: its largest magnitude comes
// first. The product is built as that of wgmma.cu, and differs in this:
//
// A step is 32 columns. A block scale is added to the exponents of 8 magnitudes, once per chunk,
// and the codes choose among them: 10 instructions for 8 weights, and no multiplication.
//
// The matrix unit adds 8-bit products with about 14 binary digits, dropping what is below
// (DeepSeek-V3's report, section 3.3.2; experiments in arXiv:2603.20421), so a long sum would
// lose its small terms. It adds 128 columns only, and those sums are added in fp32 registers. That
// takes two sets of sums, hence blocks of 128 tokens and no more. While a warpgroup adds, the
// matrix unit works for the other one. Of a multiprocessor's 2048 issue slots in the 512 cycles
// that its matrix unit wants for 128 columns of a block, about 1900 are used (sm_90a machine code).
//
// In those cycles a block on its own would want 24 KB from L2, 48 bytes per cycle: two blocks of
// 128 rows share the activations that they copy, which leaves 32. A block goes through all columns:
// this is for many tokens, where there are blocks enough.
#include "cuda/codes/chunk.cuh"
#include "cuda/codes/group.cuh"
#include "fold.h"
#include "warpgroups.cuh"

namespace mixbits {
namespace cuda {
namespace {

constexpr int kShare = 2;  // blocks of a cluster: other rows, the same tokens
constexpr int kBlockTokens = kE4M3Tokens, kSums = kBlockTokens / 2;
constexpr int kStages = 6, kStageBytes = kBlockTokens * kPreparedColumns;
constexpr int kRingBytes = kStages * kStageBytes, kSumBytes = kBlockTokens * kSumStride * 4;
constexpr int kSharedBytes = kBarrierBytes + (kRingBytes > kSumBytes ? kRingBytes : kSumBytes);

// --- activations ----------------------------------------------------------------------------

// The largest magnitude of a token's row, as bits, where NaN and infinity are above all numbers.
template <class T>
__device__ inline int32_t largest_magnitude(const T* row, int columns, bool aligned) {
  __shared__ int32_t of_warps[kWarps];
  int32_t largest = 0;
  for (int column = threadIdx.x * kLaneColumns; column < columns; column += kWarps * kRun) {
    float values[kLaneColumns];
    load_columns(row, column, columns, aligned, values);
#pragma unroll
    for (const float v : values) largest = max(largest, bit_cast<int32_t>(v) & 0x7fffffff);
  }
  largest = combine_lanes(largest, 32, [](int32_t a, int32_t b) { return max(a, b); });
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) largest = max(largest, of_warps[warp]);
  return largest;
}

// A block per token, those that only fill the last block of the product included.
template <class T>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const T* x, uint8_t* out, float* scales, int tokens, int columns, bool aligned) {
  const int token = blockIdx.x, lane = threadIdx.x % 32;
  const int tiles = (columns + kRun - 1) / kRun;
  static_assert(kRun == kPreparedColumns, "a warp's run is what a tile has");
  const T* row = x + int64_t(token) * columns;
  if (token >= tokens) columns = 0;
  const TokenScale by = token_scale(largest_magnitude(row, columns, aligned));
  if (threadIdx.x == 0) scales[token] = by.scale;
  uint8_t* const block = out + int64_t(token / kBlockTokens) * tiles * kStageBytes;
  for (int tile = threadIdx.x / 32; tile < tiles; tile += kWarps) {
    const int column = tile * kRun + lane * kLaneColumns;
    float v[kLaneColumns] = {};
    load_columns(row, column, columns, aligned, v);
    // 4 adjacent columns are adjacent in the tile too.
    const uint32_t codes = ptx::to_e4m3(v[0] * by.inverse, v[1] * by.inverse) |
                           ptx::to_e4m3(v[2] * by.inverse, v[3] * by.inverse) << 16;
    const int place = e4m3_byte(token % kBlockTokens, e4m3_position(lane * kLaneColumns));
    *reinterpret_cast<uint32_t*>(block + int64_t(tile) * kStageBytes + place) = codes;
  }
}

// --- the product ----------------------------------------------------------------------------

// The 8 codes of a word as e4m3: 0-3 and 4-7.
__device__ __forceinline__ void fold_word(uint32_t word, const FoldTable& table, uint32_t& first,
                                          uint32_t& second) {
  const uint32_t magnitudes = word & 0x77777777u;
  // Its sign is bit 2 of a code's selector, and bit 7 of the byte; the other bits may be anything.
  const uint32_t signs = word >> 1;
  first = ptx::and_or(ptx::permute(0, 0x80808080u, signs), 0x80808080u,
                      ptx::permute(table.low, table.high, magnitudes));
  second = ptx::and_or(ptx::permute(0, 0x80808080u, signs >> 16), 0x80808080u,
                       ptx::permute(table.low, table.high, magnitudes >> 16));
}

struct FoldedTile {  // 128 columns of a lane's two rows
  Chunk<kE2M1> chunks[2];

  __device__ __forceinline__ void load(const PackedWeight& weight, const uint32_t (&rows)[2],
                                       int column) {
    load_chunk<kE2M1>(weight, rows[0], column, chunks[0]);
    load_chunk<kE2M1>(weight, rows[1], column, chunks[1]);
  }

  // Operand A of the tile's 4 steps.
  __device__ __forceinline__ void decode(const int (&row_scales)[2], uint32_t (&a)[4][4]) const {
    const FoldTable upper = fold_table(int(chunks[0].scale) - row_scales[0]);
    const FoldTable lower = fold_table(int(chunks[1].scale) - row_scales[1]);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      fold_word(chunks[0].words[step], upper, a[step][0], a[step][2]);
      fold_word(chunks[1].words[step], lower, a[step][1], a[step][3]);
    }
  }
};

// part = a b over the 128 columns of a tile in shared memory.
__device__ __forceinline__ void multiply_tile(const uint32_t (&a)[4][4], const uint8_t* tile,
                                              float (&part)[kSums]) {
  constexpr int kStep = 32 / 16;  // descriptors count 16 bytes
  const uint64_t b = ptx::swizzled_operand(ptx::shared_address(tile));
  ptx::wgmma_fence();
  ptx::wgmma_e4m3<false>(part, a[0], b);
#pragma unroll
  for (int step = 1; step < 4; ++step) ptx::wgmma_e4m3<true>(part, a[step], b + step * kStep);
  ptx::wgmma_commit();
}

__device__ __forceinline__ int first_block_row() {
  return (blockIdx.z * kShare + blockIdx.x) * kBlockRows;
}

__device__ __forceinline__ void multiply_tiles(const PackedWeight& weight,
                                               const uint8_t* row_scales, const uint8_t* ring,
                                               uint64_t* full, uint64_t* empty, int tiles,
                                               float (&sums)[kSums]) {
  constexpr int kAhead = 2;  // a tile is loaded that much before it is decoded
  const int row = first_block_row() + first_row();
  const uint32_t rows[2] = {valid_row(weight, row), valid_row(weight, row + 8)};
  const int scales[2] = {row_scales[rows[0]], row_scales[rows[1]]};
  int column = threadIdx.x % 4 * chunk_columns(4);
  uint32_t sets[2][4][4];
  FoldedTile loaded[kAhead];
#pragma unroll
  for (int ahead = 0; ahead < kAhead; ++ahead, column += kPreparedColumns) {
    loaded[ahead].load(weight, rows, column);
  }
  loaded[0].decode(scales, sets[0]);
  loaded[0].load(weight, rows, column);
  float part[kSums] = {};
  int stage = 0, parity = 0;
  for (int start = 0; start < tiles; start += kAhead) {
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      if (start + ahead >= tiles) break;
      ptx::barrier_wait(&full[stage], parity);
      multiply_tile(sets[ahead], ring + stage * kStageBytes, part);
      // Meanwhile the next tile's weights; beyond the last they are decoded for nothing.
      column += kPreparedColumns;
      loaded[1 - ahead].decode(scales, sets[1 - ahead]);
      loaded[1 - ahead].load(weight, rows, column);
      ptx::wgmma_wait<0>();
      if (threadIdx.x % 32 < kShare) ptx::barrier_arrive_at(&empty[stage], threadIdx.x % 32);
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] += part[i];
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  }
}

// Sums in shared memory, times both scales -> out. A thread has two adjacent rows of some tokens.
template <class T>
__device__ __forceinline__ void write_block(const float* sums, const uint8_t* row_scales,
                                            const float* token_scales, int rows, T* out,
                                            int tokens) {
  constexpr int kPairs = kBlockRows / 2;
  static_assert(kMultipliers % kPairs == 0, "the same two rows of every token");
  const int pair = threadIdx.x % kPairs * 2, row = first_block_row() + pair;
  if (row >= rows) return;
  const float scale[2] = {e8m0_to_float(row_scales[row]),
                          e8m0_to_float(row_scales[min(row + 1, rows - 1)])};
  for (int place = threadIdx.x / kPairs; place < kBlockTokens; place += kMultipliers / kPairs) {
    const int token = blockIdx.y * kBlockTokens + place;
    if (token >= tokens) break;
    const float by = token_scales[token];
    const float* const sum = &sums[place * kSumStride + pair];
    const float values[2] = {sum[0] * scale[0] * by, sum[1] * scale[1] * by};
    store_columns(out + int64_t(token) * rows, row, rows, rows % 2 == 0, values);
  }
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 1)  // the 1 fixes the registers at entry
    e4m3_kernel(const uint8_t* prepared, const float* token_scales, PackedWeight weight,
                const uint8_t* row_scales, T* out, int tokens) {
#ifdef MB_HAS_WGMMA
  extern __shared__ __align__(1024) uint8_t shared[];
  uint64_t* full = reinterpret_cast<uint64_t*>(shared);
  uint64_t* empty = full + kStages;
  uint8_t* ring = shared + kBarrierBytes;
  const int tiles = (weight.columns + kPreparedColumns - 1) / kPreparedColumns;
  init_ring<kStages, kShare>(full, empty);
  ptx::cluster_sync();

  if (threadIdx.x >= kMultipliers) {
    ptx::give_registers<24>();
    if (threadIdx.x == kMultipliers) {
      copy_tiles<kStages, kStageBytes, kShare>(prepared + int64_t(blockIdx.y) * tiles * kStageBytes,
                                               ring, full, empty, tiles);
    }
    ptx::cluster_sync();
  } else {
    ptx::take_registers<240>();
    float* const block_sums = reinterpret_cast<float*>(ring);
    {
      float sums[kSums] = {};
      multiply_tiles(weight, row_scales, ring, full, empty, tiles, sums);
      ptx::sync_threads<kMultipliers>();  // nobody reads the ring any more
      store_sums<kBlockTokens>(sums, block_sums);
    }
    ptx::sync_threads<kMultipliers>();
    write_block<T>(block_sums, row_scales, token_scales, weight.rows, out, tokens);
    ptx::cluster_sync();  // no block ends while another arrives at its barriers
  }
#endif
}

}  // namespace

const char* prepare_e4m3(const void* x, uint8_t* out, float* scales, int64_t tokens,
                         int64_t columns, int dtype, void* stream) {
  if (tokens == 0 || columns == 0) return nullptr;
  const bool aligned = rows_aligned(x, columns * 2, kLaneColumns * 2);
  dispatch_half(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const unsigned padded = unsigned(divide_up(tokens, kBlockTokens)) * kBlockTokens;
    prepare_kernel<T><<<padded, kThreads, 0, cudaStream_t(stream)>>>(
        static_cast<const T*>(x), out, scales, int(tokens), int(columns), aligned);
  });
  return launch_result();
}

const char* packed_matmul_e4m3(const MatmulArgs& a, const uint8_t* row_scales,
                               const float* token_scales, void* stream) {
  if (a.tokens == 0 || a.rows == 0 || a.columns == 0) return nullptr;
  if (a.segment_count != 1) return "one segment";
  const SegmentArgs& segment = a.segments[0];
  if (element_of(segment) != kE2M1) return "weights must be e2m1";
  PackedWeight weight{};
  if (const char* error = packed_weight(segment, a.rows, &weight)) return error;
  // Blocks that read the same rows of the weight run at the same time and share them in L2.
  const dim3 grid(kShare, unsigned(divide_up(a.tokens, kBlockTokens)),
                  unsigned(divide_up(a.rows, kShare * kBlockRows)));
  if (grid.y > 65535 || grid.z > 65535) return "at most 8388480 tokens and 16776960 rows";
  const char* error = "activations must be bfloat16 or float16";
  dispatch_half(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    error = ptx::launch_cluster(e4m3_kernel<T>, grid, kBlockThreads, kSharedBytes, kShare, stream,
                                static_cast<const uint8_t*>(a.x), token_scales, weight, row_scales,
                                static_cast<T*>(a.out), int(a.tokens));
  });
  return error;
}

}  // namespace cuda
}  // namespace mixbits
